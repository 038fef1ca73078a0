//! Compiles the schemas without `protoc`.
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let schemas =
        ["common", "raft", "fleet", "control", "work"].map(|name| format!("schema/{name}.proto"));
    for schema in &schemas {
        println!("cargo:rerun-if-changed={schema}");
    }
    let descriptors = protox::compile(&schemas, ["schema"])?;
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        .compile_fds(descriptors)?;
    Ok(())
}
