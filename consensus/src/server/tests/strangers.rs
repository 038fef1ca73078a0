//! Peers with a valid certificate that are not who they say.

use super::*;
use forebay_link::{Code, ConnectError, LinkClosed};

#[test]
fn a_control_node_that_is_not_the_member_it_claims_to_be_is_refused() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let members = cell.members();
    let peer = (leader + 1) % 3;
    let name = format!("c{}", peer + 1);
    let right = (1, members[peer].id, members[peer].store_id.clone());
    let (cluster, id, store) = right.clone();
    let term = cell.status(leader).term;
    for (case, name, (cluster, id, store), refused) in [
        ("no member", "c9", right.clone(), true),
        (
            "another member's id",
            &name,
            (cluster, members[leader].id, store.clone()),
            true,
        ),
        ("another cluster", &name, (2, id, store), true),
        (
            "another disk",
            &name,
            (cluster, id, vec![9; 16].into()),
            true,
        ),
        ("the member", &name, right, false),
    ] {
        let paths = cell.paths(Role::Control, name);
        let address = cell.addresses[leader].clone();
        cell.runtime.block_on(async {
            let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
            endpoint.update_hello(|hello| {
                hello.cluster_id = vec![cluster; 16].into();
                hello.node_id = id;
                hello.store_id = store.clone();
            });
            let expect = Expect::role(Role::Control);
            let link = endpoint.connect(&address, Alpn::Raft, &expect, PATIENCE);
            let link = match link.await {
                Ok(link) => link,
                // Refused before its Hello was read.
                Err(ConnectError::TurnedAway { .. }) if refused => return,
                Err(error) => panic!("{case}: {error}"),
            };
            let patience = Duration::from_millis(if refused { 3_000 } else { 300 });
            let closed = tokio::time::timeout(patience, link.closed()).await.ok();
            let by_identity = matches!(
                closed,
                Some(LinkClosed::Peer { code, .. }) if code == Code::Identity as u64
            );
            assert_eq!(by_identity, refused, "{case}: {closed:?}");
        });
    }
    assert_eq!(cell.status(leader).term, term);
}

#[test]
fn what_is_no_raft_message_ends_the_link_and_nothing_else() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let members = cell.members();
    let peer = (leader + 1) % 3;
    let paths = cell.paths(Role::Control, &format!("c{}", peer + 1));
    let address = cell.addresses[leader].clone();
    cell.runtime.block_on(async {
        let endpoint = Endpoint::client(&Credentials::load(&paths).unwrap()).unwrap();
        endpoint.update_hello(|hello| {
            hello.cluster_id = vec![1; 16].into();
            hello.node_id = members[peer].id;
            hello.store_id = members[peer].store_id.clone();
        });
        for garbage in [
            Frame::new(Kind::Raft, vec![0xff; 100].into()),
            Frame::new(Kind::Applied, vec![0; 8].into()),
        ] {
            let expect = Expect::role(Role::Control);
            let link = endpoint.connect(&address, Alpn::Raft, &expect, PATIENCE);
            let link = link.await.unwrap();
            let mut stream = link.open_one_way().unwrap();
            stream.send(&garbage).await.unwrap();
            let closed = tokio::time::timeout(PATIENCE, link.closed()).await;
            let code = Code::Protocol as u64;
            assert!(
                matches!(closed, Ok(LinkClosed::Peer { code: found, .. }) if found == code),
                "{closed:?}"
            );
        }
    });
    assert!(revision(&cell.apply_config(leader, 1, TWO_POOLS, 0)) > 0);
}
