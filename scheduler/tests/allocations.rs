//! No decision allocates, once the buffers of the view have grown to the fleet.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of a test fail as its assertions do

mod worlds;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use forebay_scheduler::policy;
use rand::SeedableRng;
use rand::rngs::StdRng;
use worlds::World;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counted for each thread.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[allow(unsafe_code)] // it hands everything on
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[test]
fn no_decision_allocates_after_the_first_by_any_policy() {
    for seed in 0..40 {
        let world = World::drawn(seed);
        for policy in policy::ALL {
            let mut view = world.view.clone();
            let mut rng = StdRng::seed_from_u64(seed);
            let _ = view.pick(world.now, &world.request(), policy, &mut rng);
            let before = ALLOCATIONS.get();
            for _ in 0..10 {
                let _ = view.pick(world.now, &world.request(), policy, &mut rng);
            }
            assert_eq!(ALLOCATIONS.get(), before, "{}", policy.name());
        }
    }
}
