//! What a process gives up at its start so that no prompt can leave it by accident.

use std::io::Write as _;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// A guard against leaks could not be put in place.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot turn core dumps off ({0}): a crash could write prompts to disk; start the process where \
     it may lower its own RLIMIT_CORE"
)]
pub struct HygieneError(#[from] rustix::io::Errno);

/// Forbids core dumps and debuggers of other users: memory holds prompts.
///
/// # Errors
///
/// When the kernel refuses, which a role treats as a reason not to start.
pub fn no_core_dumps() -> Result<(), HygieneError> {
    setrlimit(
        Resource::Core,
        Rlimit {
            current: Some(0),
            maximum: Some(0),
        },
    )?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Replaces the panic message by its place: a formatted message may quote a request.
pub fn quiet_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let place = panic
            .location()
            .map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        // A message without arguments is part of the program; any other may carry a payload.
        let message = panic.payload().downcast_ref::<&'static str>();
        let mut stderr = std::io::stderr().lock();
        // Nobody is left to tell when stderr is gone.
        let _ = match message {
            Some(message) => writeln!(stderr, "panic in thread {name} at {place}: {message}"),
            None => writeln!(stderr, "panic in thread {name} at {place}"),
        };
    }));
}
