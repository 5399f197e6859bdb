//! What follows from a step's result.

use crate::core::Core;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::ids::Step;
use crate::sched::ends::{finish, lose, unpark};
use crate::sched::flights::{FlightRow, Save};
use crate::sched::request::Finish;

/// See [`Core::commit`].
pub(crate) fn commit(core: &mut Core, step: Step, tokens: &[u32], accepted: &[i32]) -> Result<(), CoreError> {
    let whole = core.flights.oldest(step)?.check_result(tokens, accepted)?;
    let Some(mut flight) = core.flights.land() else { return Ok(()) };
    core.memory.retire(core.flights.done(), &flight.tickets);
    core.journal.counters.steps += 1;
    let (mut saves, mut at) = (flight.saves.drain(..), 0);
    for &row in &flight.rows {
        let save = if row.saves { saves.next() } else { None };
        // A row samples one token at most (see `FlightRow`), so tokens and counts go together.
        let sample = at;
        at += row.samples as usize;
        let refused = !whole && row.samples > 0 && accepted[sample] == 0;
        let token = (row.samples > 0).then(|| (tokens[sample], sample as u32));
        commit_row(core, step, row, save, token, refused)?;
    }
    drop(saves);
    core.flights.recycle(flight);
    Ok(())
}

/// A row's result, if its request is still in the same stay. `token` comes with its place among the samples; of a row that is
/// refused nothing counts.
fn commit_row(
    core: &mut Core,
    step: Step,
    row: FlightRow,
    save: Option<Save>,
    token: Option<(u32, u32)>,
    refused: bool,
) -> Result<(), CoreError> {
    let until = core.flights.fence();
    let Some(request) = core.requests.in_stay(row.slot, row.epoch).filter(|_| !refused) else {
        return forget_row(core, row, save);
    };
    core.memory.computed(request, row.end, until);
    if let Some(save) = save
        && let Some(run) = request.run_mut()
    {
        core.memory.keep_state(run, row.end, save, until);
    }
    let (id, known) = (request.id, request.known());
    if row.prefill {
        core.journal.push(id, step, What::Prefill { done: row.end, total: known });
    }
    let Some((token, sample)) = token else {
        let decoding = request.run().is_some_and(|run| run.decoding);
        let over = row.end == known && decoding && request.max_new == request.outputs();
        return if over { finish(core, row.slot, Finish::Length, None) } else { Ok(()) };
    };
    let index = request.outputs();
    request.token(token)?;
    let stops = request.stop_ids.contains(&token);
    let full = request.outputs() == request.max_new;
    let late = index == 0 && core.pace.is_late(request);
    core.journal.counters.deadline_misses += u64::from(late);
    core.journal.push(id, step, What::Token { token, index, sample });
    match (stops, full) {
        (true, _) => finish(core, row.slot, Finish::Stop, Some(token)),
        (false, true) => finish(core, row.slot, Finish::Length, None),
        _ => Ok(()),
    }
}

/// Nothing of a row counts: its request is gone, or its token was not accepted.
#[cold]
fn forget_row(core: &mut Core, row: FlightRow, save: Option<Save>) -> Result<(), CoreError> {
    core.memory.drop_states(save.map(|save| save.pages), core.flights.fence());
    if core.requests.in_stay(row.slot, row.epoch).is_none() {
        return Ok(());
    }
    core.journal.counters.rows_refused += 1;
    lose(core, row.slot, Loss::Rollback)
}

/// See [`Core::rollback`].
pub(crate) fn rollback(core: &mut Core, step: Step) -> Result<(), CoreError> {
    let flights = core.flights.take_from(step)?;
    core.pace.forget_from(step);
    let mut tickets = Vec::new();
    for mut flight in flights {
        core.journal.counters.rollbacks += 1;
        core.memory.drop_states(flight.saves.drain(..).map(|save| save.pages), core.flights.fence());
        let rows = flight.rows.iter().map(|row| (row.slot, row.epoch));
        for (slot, epoch) in rows.chain(flight.forks.iter().copied()) {
            if core.requests.in_stay(slot, epoch).is_some() {
                lose(core, slot, Loss::Rollback)?;
            }
        }
        for &(slot, saved) in &flight.parks {
            if core.requests.parked(slot).is_some_and(|parked| parked.saved == saved) {
                unpark(core, slot);
            }
        }
        // Ascending: the flights come newest first.
        flight.tickets.append(&mut tickets);
        tickets = std::mem::take(&mut flight.tickets);
        core.flights.recycle(flight);
    }
    let ended = core.flights.inherit(tickets);
    core.memory.retire(core.flights.done(), &ended);
    Ok(())
}
