//! A core as data: what `dump` writes and the simulator goes on from.
//!
//! Options, prefixes with their tokens, snapshots, hints, live requests, and what the cost model has learnt. Steps in flight
//! are left out: requests that run become waiting ones, whose published history is in the cache. Loading twice gives two cores
//! that behave alike.

use serde::{Deserialize, Serialize};

use crate::cache::CacheImage;
use crate::core::{Core, Options};
use crate::error::CoreError;
use crate::ids::RequestId;
use crate::layout::LayoutSpec;
use crate::sched::budget::Learnt;
use crate::sched::explain::Explain;
use crate::sched::request::{Request, Submit};

/// Raised when what is written changes.
const VERSION: u32 = 5;

#[derive(Serialize, Deserialize)]
struct Dump {
    version: u32,
    layout: u64,
    options: Options,
    cache: CacheImage,
    requests: Vec<Waiting>,
    learnt: Learnt,
}

/// A live request as it would be submitted, and what it has sampled so far.
#[derive(Serialize, Deserialize)]
struct Waiting {
    submit: Submit,
    outputs: Vec<u32>,
    computed: u32,
    explain: Explain,
}

impl Waiting {
    fn of(r: &Request) -> Self {
        let tokens = r.tokens.to_vec();
        let (prompt, outputs) = tokens.split_at(r.prompt as usize);
        let running = r.run();
        Waiting {
            submit: r.as_submitted(prompt.to_vec()),
            outputs: outputs.to_vec(),
            computed: running.map_or(r.computed_before, |run| run.computed),
            explain: Explain {
                preemptions: r.explain.preemptions + u32::from(running.is_some()),
                ..r.explain
            },
        }
    }
}

/// A live request, for whoever goes on with a loaded core.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Live {
    /// Its name.
    pub id: RequestId,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// Tokens sampled so far.
    pub outputs: u32,
    /// Tokens to sample at most.
    pub max_new: u32,
    /// Whose it is.
    pub tenant: u32,
    /// Higher goes first.
    pub priority: i32,
}

impl Live {
    pub(crate) fn of(r: &Request) -> Self {
        Live {
            id: r.id,
            prompt: r.prompt,
            outputs: r.outputs(),
            max_new: r.max_new,
            tenant: r.hint.tenant,
            priority: r.place.priority,
        }
    }
}

/// See [`Core::dump`].
pub(crate) fn dump(core: &Core) -> String {
    let dump = Dump {
        version: VERSION,
        layout: core.memory.cache().fingerprint(),
        options: core.options.clone(),
        cache: core.memory.cache().image(),
        requests: core.requests.by_arrival().into_iter().map(Waiting::of).collect(),
        learnt: core.pace.learnt(),
    };
    serde_json::to_string(&dump).expect("numbers, texts and lists can be written")
}

/// See [`Core::load`].
pub(crate) fn load(layout: &LayoutSpec, text: &str) -> Result<Core, CoreError> {
    let wrong = |what: String| CoreError::config("dump", what, "it must be what dump() returned");
    let dump: Dump = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
    if dump.version != VERSION {
        return Err(wrong(format!("of version {}", dump.version)));
    }
    if dump.layout != layout.fingerprint() {
        return Err(CoreError::config("dump", "of another layout", "load it with the layout of its model"));
    }
    if !dump.learnt.is_sound() {
        return Err(wrong("with a cost model that no steps can teach".to_owned()));
    }
    let max_waiting = dump.options.max_waiting;
    let mut core = Core::new(layout, Options { max_waiting: usize::MAX, ..dump.options })?;
    core.memory.fill(&dump.cache)?;
    core.pace.resume(core.memory.cache().time(), dump.learnt);
    for waiting in dump.requests {
        let id: RequestId = waiting.submit.id;
        core.submit(waiting.submit)?;
        if let Some(slot) = core.requests.find(id) {
            let request = core.requests.get_mut(slot);
            request.tokens.extend(waiting.outputs);
            (request.computed_before, request.explain) = (waiting.computed, waiting.explain);
        }
    }
    core.options.max_waiting = max_waiting;
    Ok(core)
}
