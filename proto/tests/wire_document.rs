//! `docs/wire.md` has the frames and the RPC table that the code has.

#![allow(clippy::unwrap_used)] // helpers of a test fail as its assertions do

use forebay_proto::Role;
use forebay_proto::frame::Kind;
use forebay_proto::rpc::Rpc;

fn document() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/wire.md")).unwrap()
}

#[test]
fn every_frame_stands_with_its_number_and_bound() {
    let document = document();
    for kind in Kind::ALL {
        let row = format!("| {kind:?} | {:#04x} | {} |", *kind as u8, kind.max_bytes());
        assert!(document.contains(&row), "missing: {row}");
    }
}

#[test]
fn every_rpc_stands_with_the_roles_that_may_call_it() {
    let document = document();
    for rpc in Rpc::ALL {
        let roles = Role::ALL.into_iter().zip("cbavoA".chars());
        let allowed: String = roles
            .map(|(role, letter)| if rpc.allows(role) { letter } else { '.' })
            .collect();
        let row = format!("| {rpc:?} | {allowed} |");
        assert!(document.contains(&row), "missing: {row}");
    }
}
