//! What every policy of [`Eviction::ALL`] has to do: random lists of items against a plain set of them. One that only this file
//! knows is held to the same.

use std::collections::BTreeMap;

use super::*;

const GROUPS: [Group; 3] = [
    Group { level: 0, snapshot: false },
    Group { level: 0, snapshot: true },
    Group { level: 2, snapshot: false },
];

/// What came once goes before what came again.
#[derive(Debug)]
struct Segmented(Shelves<bool>);

impl Policy for Segmented {
    fn insert(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.insert(group, standing.past.uses > 0, standing.used, item);
    }

    fn remove(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.remove(group, standing.past.uses > 0, standing.used, item);
    }

    fn victim(&self, group: Group, now: u64) -> Option<Head> {
        self.0.least(group, false, |again, used| segment_worth(again, 0, now.saturating_sub(used)))
    }

    fn worth(&self, standing: &Standing, age: u64) -> f64 {
        segment_worth(standing.past.uses > 0, standing.octave, age)
    }
}

fn segment_worth(again: bool, octave: i8, age: u64) -> f64 {
    by_age(octave, age) * if again { 8.0 } else { 1.0 }
}

const SEGMENTED: Eviction = Eviction { name: "segmented", make: || Box::new(Segmented(Shelves::new())) };

fn policies() -> impl Iterator<Item = Eviction> {
    Eviction::ALL.into_iter().chain([SEGMENTED])
}

/// A policy, and what is listed in it.
struct Listed {
    policy: Box<dyn Policy>,
    items: BTreeMap<Item, (Group, Standing)>,
    state: u64,
    now: u64,
}

impl Listed {
    fn new(eviction: Eviction, seed: u64) -> Self {
        Listed { policy: eviction.policy(), items: BTreeMap::new(), state: seed + 1, now: 0 }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.state =
            self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % n
    }

    fn standing(&mut self, group: Group) -> Standing {
        let (born, used) = (self.now - self.below(self.now + 1), self.now);
        let past = Past {
            snapshot: group.snapshot,
            uses: self.below(12) as u8,
            grown: !group.snapshot && self.below(2) == 0,
        };
        let octave = if self.policy.weighs_cost() { self.below(7) as i8 - 3 } else { 0 };
        let level = group.level;
        Standing { born, used, expiry: 0, dead: false, level, octave, tenant: 0, past }
    }

    fn insert(&mut self) {
        let group = GROUPS[self.below(3) as usize];
        let id = self.below(60) as u32;
        let item = if group.snapshot { Item::Snapshot(id) } else { Item::Blocks(id) };
        if !self.items.contains_key(&item) {
            let standing = self.standing(group);
            self.policy.insert(group, item, &standing);
            self.items.insert(item, (group, standing));
        }
    }

    fn remove(&mut self, item: Item) -> Standing {
        let (group, standing) = self.items.remove(&item).expect("it is listed");
        self.policy.remove(group, item, &standing);
        standing
    }

    /// Takes the first of a group out, as an eviction or as a use.
    fn take(&mut self, group: Group) {
        let Some(head) = self.policy.victim(group, self.now) else { return };
        let standing = self.remove(head.item);
        let age = self.now - standing.used;
        match self.below(2) {
            0 => self.policy.evicted(standing.past, age, 3),
            _ => self.policy.used(standing.past, age, 3),
        }
    }

    fn step(&mut self) {
        self.now += self.below(4);
        match self.below(4) {
            0 if !self.items.is_empty() => {
                let n = self.below(self.items.len() as u64) as usize;
                let item = *self.items.keys().nth(n).expect("it is below their number");
                self.remove(item);
            }
            1 => {
                let group = GROUPS[self.below(3) as usize];
                self.take(group);
            }
            _ => self.insert(),
        }
    }

    fn heads(&self) -> [Option<Head>; 3] {
        GROUPS.map(|group| self.policy.victim(group, self.now))
    }
}

fn for_all(check: impl Fn(&mut Listed)) {
    for eviction in policies() {
        for seed in 0..40 {
            let mut listed = Listed::new(eviction, seed);
            for _ in 0..120 {
                listed.step();
            }
            check(&mut listed);
        }
    }
}

#[test]
fn the_first_of_a_group_is_one_of_it_and_every_item_goes_once() {
    for_all(|listed| {
        for group in GROUPS {
            let own: Vec<Item> =
                listed.items.iter().filter(|(_, (g, _))| *g == group).map(|(item, _)| *item).collect();
            for left in (0..own.len()).rev() {
                let head = listed.policy.victim(group, listed.now).expect("not all have gone");
                assert!(own.contains(&head.item) && listed.items.contains_key(&head.item), "{head:?}");
                let standing = listed.remove(head.item);
                let age = listed.now - head.key;
                assert_eq!(head.worth, listed.policy.worth(&standing, age), "one scale for all");
                let rest = listed.items.values().filter(|(g, _)| *g == group).count();
                assert_eq!(rest, left);
            }
            assert_eq!(listed.policy.victim(group, listed.now), None, "all have gone");
        }
    });
}

#[test]
fn worth_is_a_number_above_0_that_time_does_not_raise() {
    for_all(|listed| {
        for (group, now) in GROUPS.into_iter().zip(listed.heads()) {
            let later = listed.policy.victim(group, listed.now + 1000);
            assert_eq!(now.is_some(), later.is_some());
            for (now, later) in now.into_iter().zip(later) {
                assert!(later.worth > 0.0 && later.worth <= now.worth && now.worth.is_finite());
            }
        }
        for (_, standing) in listed.items.values() {
            let worth = [0, 1, 10, 1 << 40].map(|age| listed.policy.worth(standing, age));
            assert!(worth.is_sorted_by(|a, b| a > b) && worth[3] > 0.0 && worth[0].is_finite(), "{worth:?}");
            let dearer = Standing { octave: standing.octave + 1, ..*standing };
            assert!(listed.policy.worth(&dearer, 10) > worth[2], "what saves more is worth more");
        }
    });
}

#[test]
fn of_equals_the_one_that_is_older_goes_first() {
    for_all(|listed| {
        let group = Group { level: -1, snapshot: false };
        let standing = listed.standing(group);
        for (id, at) in [(7, 12), (3, 10), (9, 11)] {
            let standing = Standing { born: at, used: at, ..standing };
            listed.policy.insert(group, Item::Blocks(id), &standing);
        }
        for (id, at) in [(3, 10), (9, 11), (7, 12)] {
            let head = listed.policy.victim(group, 20).expect("one is left");
            assert_eq!((head.item, head.key), (Item::Blocks(id), at));
            listed.policy.remove(group, head.item, &Standing { born: at, used: at, ..standing });
        }
    });
}

#[test]
fn the_same_calls_give_the_same_order_and_what_is_learned_can_be_carried_over() {
    for eviction in policies() {
        for seed in 0..20 {
            let (mut a, mut b) = (Listed::new(eviction, seed), Listed::new(eviction, seed));
            for _ in 0..200 {
                a.step();
                b.step();
                assert_eq!(a.heads(), b.heads());
            }
            // A policy may estimate from what it learns now and then only; both go on from the same.
            let (mut heir, learnt) = (Listed::new(eviction, seed), a.policy.learnt());
            assert!(heir.policy.set_learnt(&learnt) && a.policy.set_learnt(&learnt));
            assert_eq!(heir.policy.learnt(), learnt);
            for (item, (group, standing)) in &a.items {
                heir.policy.insert(*group, *item, standing);
            }
            heir.now = a.now;
            let gone = |l: &mut Listed| GROUPS.map(|group| l.policy.victim(group, l.now).map(|h| h.item));
            assert_eq!(gone(&mut heir), gone(&mut a));
            assert!(!heir.policy.set_learnt(&[1.0]), "it is nothing that a policy learns");
        }
    }
}

#[test]
fn every_name_reads_as_it_is_written_and_another_is_refused_with_them() {
    for eviction in Eviction::ALL {
        assert_eq!(eviction.name().parse::<Eviction>().unwrap(), eviction);
        let text = serde_json::to_string(&eviction).unwrap();
        assert_eq!(text, format!("\"{}\"", eviction.name()));
        assert_eq!(serde_json::from_str::<Eviction>(&text).unwrap(), eviction);
    }
    let names: std::collections::BTreeSet<_> = Eviction::ALL.map(Eviction::name).into();
    assert_eq!(names.len(), Eviction::ALL.len(), "no name is given twice");
    let refused = "mru".parse::<Eviction>().unwrap_err().to_string();
    let names = Eviction::ALL.map(Eviction::name).join(", ");
    assert_eq!(refused, format!("eviction is \"mru\"; valid values are {names}"));
    assert!(serde_json::from_str::<Eviction>("\"mru\"").unwrap_err().to_string().contains(&refused));
}

#[test]
fn a_policy_of_its_own_gives_the_order_that_it_says() {
    let mut policy = SEGMENTED.policy();
    let group = GROUPS[0];
    let past = |uses| Past { snapshot: false, uses, grown: false };
    let standing = |used, uses| Standing {
        born: 0,
        used,
        expiry: 0,
        dead: false,
        level: 0,
        octave: 0,
        tenant: 0,
        past: past(uses),
    };
    for (id, used, uses) in [(1, 10, 1), (2, 14, 0), (3, 12, 0)] {
        policy.insert(group, Item::Blocks(id), &standing(used, uses));
    }
    for (id, used, uses) in [(3, 12, 0), (2, 14, 0), (1, 10, 1)] {
        let head = policy.victim(group, 20).expect("one is left");
        assert_eq!(head.item, Item::Blocks(id));
        policy.remove(group, head.item, &standing(used, uses));
    }
}
