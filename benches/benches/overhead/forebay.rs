//! A control node, and between client and engine a balancer and an agent.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use forebay_benches::servers::{Servers, free_ports};
use forebay_control_client::ControlClient;
use forebay_link::{Authority, CredentialPaths, Credentials, Endpoint};
use forebay_proto::{ClientId, ClusterId, Level, Role};

use crate::{Way, load};

const DEADLINE: Duration = Duration::from_secs(10);

pub(crate) async fn start(
    name: &'static str,
    program: &Path,
    dir: &Path,
    engine: SocketAddr,
) -> Way {
    let dir = &dir.join(name);
    let authority = Authority::create("bench", 1).unwrap();
    let issue = |role, name: &str| {
        let own = dir.join(name);
        authority.save(&own).unwrap();
        let (cert, key) = authority.issue(role, name, 30).unwrap().save(&own).unwrap();
        let ca = own.join("ca.pem");
        CredentialPaths { ca, cert, key }
    };
    let [control, http, admin, work, agent_admin] =
        free_ports::<5>().map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let command = |role: Role, verb: &str, name: &str, rest: &[&str]| {
        let paths = issue(role, name);
        let mut command = Command::new(program);
        command.arg(verb).args(rest);
        command
            .arg("--data-dir")
            .arg(dir.join(name).join("data"))
            .arg("--ca")
            .arg(paths.ca)
            .arg("--cert")
            .arg(paths.cert)
            .arg("--key")
            .arg(paths.key)
            .env("FOREBAY_LOG", "error");
        command
    };
    let (control, http) = (control.to_string(), http.to_string());
    let (admin, work, agent_admin) = (admin.to_string(), work.to_string(), agent_admin.to_string());
    let node = ["--admin", "127.0.0.1:0", "--listen", &control];
    let node = command(Role::Control, "control", "c1", &node);
    let node = Servers::start([node]);
    let credentials = Credentials::load(&issue(Role::Operator(Level::Admin), "admin")).unwrap();
    let endpoint = Endpoint::client(&credentials).unwrap();
    let (id, seed) = (ClientId(rand::random()), rand::random());
    let client = ControlClient::new(endpoint, vec![control.clone()], id, seed);
    while client
        .init(ClusterId(rand::random()), DEADLINE)
        .await
        .is_err()
    {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let url = format!("http://{engine}");
    #[rustfmt::skip]
    let agent = [
        "--listen", &work, "--admin", &agent_admin, "--control", &control, "--engine", &url,
        "--engine-kind", "vllm", "--slots", "256", "--profile-speed", "100",
    ];
    #[rustfmt::skip]
    let balancer = [
        "--listen", &http, "--admin", &admin, "--control", &control, "--any-key-tenant", "bench",
    ];
    let servers = Servers::start([
        command(Role::Agent, "agent", "w1", &agent),
        command(Role::Balancer, "balancer", "b1", &balancer),
    ]);
    load::wait_for(admin.parse().unwrap(), "/readyz").await;
    Way {
        name,
        address: http.parse().unwrap(),
        servers,
        _beside: Some(node),
    }
}
