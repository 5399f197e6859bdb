//! One plan: who takes over or gives way first, then decode rows, then pieces of prompts until the step is full or its time
//! is spent.
//!
//! | file | does |
//! | --- | --- |
//! | `decode.rs` | one row for each running request whose prompt is done |
//! | `prefill.rs` | pieces of prompts and admissions, in the order of fairness |
//! | `admit.rs` | a waiting request gets a slab, pages and the cheapest way to start |
//! | `fork.rs` | a request starts from the live state of another |
//! | `give_way.rs` | pages for decode, and who gives way: with its state saved, or without |

mod admit;
mod decode;
mod fork;
mod give_way;
mod prefill;

use crate::core::Core;
use crate::error::CoreError;
use crate::ids::Step;
use crate::plan::{PlanWriter, StepHeader};
use crate::sched::flights::Flight;
use crate::sched::request::Run;
use crate::sched::requests::Slot;

/// A step being made: the core that it is made for, its buffer, and what is remembered of it.
pub(crate) struct Planner<'c, 'w> {
    core: &'c mut Core,
    plan: PlanWriter<'w>,
    flight: Flight,
    /// Tokens before the rows in decode, in all.
    context: u64,
    /// Predicted time that is left for prompts.
    left_us: f64,
    /// Tokens of prompts that it may take in any case.
    floor: u32,
    /// Predicted time of the pieces of prompts, before correction.
    load_us: f64,
    /// Pieces of prompts.
    pieces: u32,
    /// A request had to give way.
    gave_way: bool,
    /// A running request that gets no row, so that it can be parked in the next step.
    held: Option<Slot>,
}

impl<'c, 'w> Planner<'c, 'w> {
    /// An empty step in `out`. See [`Core::plan`] for how it fails.
    pub fn new(core: &'c mut Core, out: &'w mut [i32]) -> Result<Self, CoreError> {
        let flight = core.flights.begin()?;
        let plan = match PlanWriter::new(&core.schema, out, flight.step) {
            Ok(plan) => plan,
            Err(refused) => {
                core.flights.put_back(flight);
                return Err(refused);
            }
        };
        Ok(Planner {
            core,
            plan,
            flight,
            context: 0,
            left_us: f64::INFINITY,
            floor: 0,
            load_us: 0.0,
            pieces: 0,
            gave_way: false,
            held: None,
        })
    }

    /// Makes the step. `None`: nothing can run now.
    pub fn make(mut self) -> Result<Option<StepHeader>, CoreError> {
        let core = &mut *self.core;
        core.requests.keep_order(&core.options, &core.memory, &core.pace);
        self.plan_forks()?;
        self.make_way()?;
        let prefilling = self.plan_decodes()?;
        self.set_budget();
        self.plan_prefills(prefilling)?;
        let Planner { core, plan, mut flight, context, load_us, .. } = self;
        let header = plan.header();
        if header.rows + header.copies == 0 {
            core.flights.put_back(flight);
            return Ok(None);
        }
        core.pace.expect(&header, context, load_us);
        (flight.samples, flight.sampled_rows) = (header.samples, header.sampled_rows);
        core.flights.launch(flight);
        Ok(Some(plan.finish()))
    }

    /// What running decodes leave of the step's time.
    fn set_budget(&mut self) {
        let header = self.plan.header();
        if header.decode_rows > 0
            && let Some(left) = self.core.pace.left_by(header.decode_rows, self.context, header.copies)
        {
            (self.left_us, self.floor) = left;
        }
    }

    /// The last step that was planned before this one.
    fn last(&self) -> Step {
        self.core.flights.last()
    }

    /// Pages that must be available before a state is saved: its own, and one for each running request.
    fn pages_for_a_save(&self) -> u32 {
        self.core.memory.snapshot_pages() + self.core.requests.running_count()
    }
}

/// Tells the device about pages that it does not know yet. False, and nothing told, when there is no room for them.
fn tell_pages(plan: &mut PlanWriter<'_>, run: &mut Run) -> bool {
    let pages = run.seq.pages();
    let news = run.adopted.len() as u32 + pages.len() as u32 - run.told;
    if news > plan.delta_room() {
        return false;
    }
    for (block, page) in run.adopted.drain(..) {
        plan.delta(run.slab, block, page);
    }
    for (block, &page) in (run.told..).zip(&pages[run.told as usize..]) {
        plan.delta(run.slab, block, page);
    }
    run.told = pages.len() as u32;
    true
}
