//! Every invariant of the scheduler, recomputed from scratch.

use std::collections::HashSet;

use crate::core::Core;
use crate::error::Malformed;
use crate::ids::PageId;
use crate::sched::request::{Request, Stage};

/// See [`Core::check`].
pub(crate) fn check(core: &Core) -> Result<(), Malformed> {
    let runs = || core.requests.iter().filter_map(Request::run);
    let parked = || core.requests.iter().filter_map(Request::parked);
    let saving = core.flights.iter().flat_map(|f| &f.saves).map(|s| &s.pages);
    let spares = runs().filter_map(|r| r.spare.as_ref()).chain(parked().filter_map(|p| p.spare.as_ref()));
    let held = saving.chain(spares.map(|(_, pages)| pages)).chain(parked().map(|p| &p.state));
    let sequences = || runs().map(|r| &r.seq).chain(parked().map(|p| &p.seq));
    let copies = core.flights.iter().map(|f| f.tickets.len()).sum::<usize>();
    core.memory.check(sequences(), held, runs().map(|r| r.slab), copies)?;
    core.requests.check()?;
    core.requests.iter().try_for_each(|request| check_request(request, core.memory.block()))?;
    let mut writers: HashSet<PageId> = HashSet::new();
    for seq in sequences() {
        for &page in &seq.pages()[seq.published_blocks() as usize..] {
            Malformed::unless(writers.insert(page), "one writer per page", || format!("{page:?} has two"))?;
        }
    }
    for seq in sequences() {
        let shared = &seq.pages()[..seq.published_blocks() as usize];
        let written = shared.iter().find(|p| writers.contains(p));
        Malformed::unless(written.is_none(), "shared pages are not written", || format!("{written:?}"))?;
    }
    Ok(())
}

fn check_request(r: &Request, block: u32) -> Result<(), Malformed> {
    let says = |what, holds| {
        Malformed::unless(holds, what, || {
            let (planned, computed, unknown) =
                r.run().map_or((0, 0, 0), |x| (x.planned, x.computed, x.unknown));
            let (id, state, known, prompt) = (r.id.0, r.stage.name(), r.known(), r.prompt);
            format!(
                "request {id} {state}: {prompt} of {known} tokens are its prompt, {planned} planned, {computed} computed, {unknown} unknown"
            )
        })
    };
    match &r.stage {
        Stage::Waiting { parked: None } => Ok(()),
        Stage::Waiting { parked: Some(parked) } => {
            let blocks = parked.pos.div_ceil(block) as usize;
            let kept = parked.seq.pages().len() == blocks.max(parked.seq.published_blocks() as usize);
            says("a parked request holds its history", kept && parked.pos < r.known())
        }
        Stage::Running(run) => {
            let covered = run.seq.pages().len() as u32 * block;
            says("pages cover what is planned", run.planned <= covered && run.computed <= run.planned)?;
            says("output within its limit", r.outputs() + run.unknown <= r.max_new)?;
            if run.decoding {
                let newest = r.known() + run.unknown.max(u32::from(r.max_new == 0));
                says("decode is at the newest token", run.planned + 1 == newest)
            } else {
                says("prefill has tokens to plan", run.planned < r.known() && run.unknown == 0)
            }
        }
    }
}
