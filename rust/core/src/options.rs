//! Limits and policies of a core.

use serde::{Deserialize, Serialize};

use crate::cache::Eviction;
use crate::cost::CostModel;
use crate::error::CoreError;
use crate::sched::budget::{StepBudget, StepCost};
use crate::sched::policy::SnapshotPolicy;

/// Limits and policies. They cross the border to Python as a dict with these keys; what is left out has its default.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Pages of the pool; must be given.
    pub pages: u32,
    /// Live-state slabs: requests that can run at once; must be given.
    pub slabs: u32,
    /// Tokens of a step.
    pub max_step_tokens: u32,
    /// Longest prompt plus output.
    pub max_len: u32,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Where state is saved for reuse.
    pub snapshots: SnapshotPolicy,
    /// Largest share of the pool that snapshots may fill while memory is short, 0 to 1.
    pub snapshot_budget: f64,
    /// Which cached page goes first.
    pub eviction: Eviction,
    /// Off: no prefix is reused.
    pub prefix_cache: bool,
    /// Changes of what is cached are kept until [`Core::cache_changes`](crate::Core::cache_changes) takes them.
    pub cache_changes: bool,
    /// Steps that may be planned and not yet committed: 1 or 2.
    pub max_in_flight: u32,
    /// What starting points cost.
    pub cost: CostModel,
    /// Tokens of a replay; `None`: as many as the layout needs to be exact.
    pub replay_tokens: Option<u32>,
    /// What a step costs besides its prompt tokens.
    pub step_cost: StepCost,
    /// Time that a step with running decodes may take.
    pub step_budget: StepBudget,
    /// Sizes in tokens, ascending, to which a device pads steps with prompts, up to the last one: where a piece of a prompt is cut, it is
    /// cut so that the step has one of them. None: steps are as long as they are.
    pub step_sizes: Vec<u32>,
    /// A request that is older than this goes ahead of all, whatever its class.
    pub max_wait_us: u64,
    /// Tenants with a share or a quota of their own; others have weight 1 and no quota.
    pub tenants: Vec<Tenant>,
}

/// A tenant's share of the device.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// As in [`Submit::tenant`].
    pub id: u32,
    /// Its share of prefill tokens relative to others, above 0.
    pub weight: f64,
    /// Cached pages that it keeps at most while others need memory; `None`: no limit.
    #[serde(default)]
    pub quota_pages: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            pages: 0,
            slabs: 0,
            max_step_tokens: 2048,
            max_len: 1 << 20,
            max_waiting: 1024,
            snapshots: SnapshotPolicy::Auto,
            snapshot_budget: 0.1,
            eviction: Eviction::default(),
            prefix_cache: true,
            cache_changes: false,
            max_in_flight: 1,
            cost: CostModel::default(),
            replay_tokens: None,
            step_cost: StepCost::default(),
            step_budget: StepBudget::Open,
            step_sizes: Vec::new(),
            max_wait_us: 30_000_000,
            tenants: Vec::new(),
        }
    }
}

impl Options {
    /// Refuses what cannot work, by name.
    pub(crate) fn validate(&self) -> Result<(), CoreError> {
        let limits = [
            ("pages", self.pages, i32::MAX as u32),
            ("slabs", self.slabs, 1 << 20),
            ("max_step_tokens", self.max_step_tokens, i32::MAX as u32),
            ("max_len", self.max_len, i32::MAX as u32),
        ];
        if let Some((name, value, most)) = limits.into_iter().find(|&(_, v, most)| v == 0 || v > most) {
            return Err(CoreError::config(name, value, format!("it must be 1 to {most}")));
        }
        if !(1..=2).contains(&self.max_in_flight) {
            return Err(CoreError::config("max_in_flight", self.max_in_flight, "it must be 1 or 2"));
        }
        self.cost.validate()?;
        self.step_cost.validate()?;
        self.step_budget.validate()?;
        if let Some(pair) = self.step_sizes.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(CoreError::config(
                "step_sizes",
                format!("{pair:?}"),
                "each must be larger than the one before",
            ));
        }
        for (i, tenant) in self.tenants.iter().enumerate() {
            let known = format!("tenants[{i}].weight");
            if !(tenant.weight.is_finite() && tenant.weight > 0.0) {
                return Err(CoreError::config(&known, tenant.weight, "it must be a number above 0"));
            }
            if self.tenants[..i].iter().any(|t| t.id == tenant.id) {
                return Err(CoreError::config("tenants", tenant.id, "each tenant may be named once"));
            }
        }
        if !(0.0..=1.0).contains(&self.snapshot_budget) {
            let budget = self.snapshot_budget;
            return Err(CoreError::config("snapshot_budget", budget, "it must be a share from 0 to 1"));
        }
        Ok(())
    }
}
