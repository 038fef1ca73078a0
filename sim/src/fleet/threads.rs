//! Runs that do not depend on each other, on several threads.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What `run` makes of each number below `tasks`, in their order whoever is done first.
pub(super) fn each<T: Send>(
    tasks: usize,
    threads: usize,
    run: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads.clamp(1, tasks.max(1)) {
            scope.spawn(|| {
                loop {
                    let task = next.fetch_add(1, Ordering::Relaxed);
                    if task >= tasks {
                        return;
                    }
                    let ran = run(task);
                    let mut done = done.lock().expect("no thread panics with the lock");
                    done.insert(task, ran);
                }
            });
        }
    });
    let done = done.into_inner().expect("no thread panics with the lock");
    done.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_stand_in_the_order_of_their_tasks() {
        for threads in [0, 1, 3, 100] {
            assert_eq!(each(5, threads, |task| task * task), [0, 1, 4, 9, 16]);
        }
        assert!(each(0, 2, |task| task).is_empty());
    }
}
