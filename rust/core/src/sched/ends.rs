//! How a stay in a slab ends: with the request, or before it.

use crate::core::Core;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::sched::request::{Finish, Stage};
use crate::sched::requests::Slot;

/// Ends a request in whatever stage it is.
pub(crate) fn finish(
    core: &mut Core,
    slot: Slot,
    reason: Finish,
    stop: Option<u32>,
) -> Result<(), CoreError> {
    core.requests.get(slot).may_finish(reason)?;
    unpark(core, slot);
    let mut request = core.requests.remove(slot);
    let (outputs, block) = (request.outputs(), core.memory.block());
    if let Stage::Running(run) = request.stage {
        let whole = matches!(reason, Finish::Stop | Finish::Length);
        if whole {
            core.memory.end_turn(&run);
        }
        core.memory.let_go(run, whole, core.flights.fence());
        if whole && core.options.prefix_cache && request.prompt > block {
            core.journal.zero_hits.stored(&request.tokens.all()[..block as usize]);
        }
    }
    let step = core.flights.last();
    core.journal.counters.finished += 1;
    core.journal.counters.aborts += u64::from(reason == Finish::Abort);
    core.journal.keep(request.id, request.explain);
    core.journal.push(request.id, step, What::Finished { reason, outputs, stop });
    core.requests.spare.keep(request.tokens);
    Ok(())
}

/// Takes the slab away. What is published stays in the tree; the request waits in its place in line and resumes there, with
/// the same tokens.
pub(super) fn lose(core: &mut Core, slot: Slot, loss: Loss) -> Result<(), CoreError> {
    let run = core.requests.stop(slot, &core.pace)?;
    core.memory.let_go(run, true, core.flights.fence());
    core.journal.counters.preemptions += u64::from(loss == Loss::Memory);
    let id = core.requests.get(slot).id;
    core.journal.push(id, core.flights.last(), What::Preempted { loss });
    Ok(())
}

/// Gives back what a parked request holds; another holds nothing that could be given back.
pub(super) fn unpark(core: &mut Core, slot: Slot) {
    if let Some(parked) = core.requests.unpark(slot) {
        core.memory.let_go_parked(parked, core.flights.fence());
    }
}
