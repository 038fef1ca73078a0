//! One binary `forebay`: picks a role, shows results.
fn main() {}
