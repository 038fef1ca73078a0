//! `docs/bounds.md`: every container of the processes has a row that says what bounds it.
#![allow(clippy::unwrap_used, clippy::panic, unreachable_pub)] // a test of texts, in modules

mod page;
mod sources;

use std::collections::BTreeSet;
use std::path::Path;

use page::{Bounds, shown};
use sources::Sources;

fn file(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

fn bounds() -> Bounds {
    Bounds::read(&std::fs::read_to_string(file("bounds.toml")).unwrap())
}

#[test]
fn every_container_of_the_processes_has_a_row_that_says_what_bounds_it() {
    let (bounds, sources) = (bounds(), Sources::read());
    let wrong = wrong(&bounds, &sources);
    assert!(wrong.is_empty(), "\n{wrong}\n{WHAT_TO_DO}");
}

const WHAT_TO_DO: &str = "\
A row belongs into the [[part]] of its process in docs/bounds.toml: bound it first, and say by what the code bounds it. What lives
for one call or message is a [[brief]] with file, fields and for. Then write the page anew:
FOREBAY_WRITE_DOCS=1 cargo test -p forebay --test bounds";

#[test]
fn the_page_of_bounds_is_what_the_data_say() {
    let page = bounds().page(&Sources::read());
    let page = page.unwrap_or_else(|problem| panic!("docs/bounds.toml: {problem}"));
    let file = file("bounds.md");
    if std::env::var_os("FOREBAY_WRITE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    assert!(
        std::fs::read_to_string(&file).unwrap_or_default() == page,
        "docs/bounds.md is not what docs/bounds.toml says; write it anew: \
         FOREBAY_WRITE_DOCS=1 cargo test -p forebay --test bounds"
    );
}

/// What is missing, too much or twice, with what to do; empty: nothing.
fn wrong(bounds: &Bounds, sources: &Sources) -> String {
    let mut out = String::new();
    let mut named = BTreeSet::new();
    for (file, field) in bounds.named() {
        if !sources.has(file, field) {
            out += &format!("\n{file} has no {field} any more: take it out of docs/bounds.toml\n");
        }
        if !named.insert((file.to_owned(), field.to_owned())) {
            out += &format!("\n{field} of {file} is twice in docs/bounds.toml\n");
        }
    }
    for ((file, field), kind) in sources.containers() {
        if named.contains(&(file.clone(), field.clone())) {
            continue;
        }
        out += &format!(
            "\n{file}: {field} ({kind}) has no row. Add:\n\n\
             [[part.row]]\n\
             file = \"{file}\"\n\
             fields = [\"{field}\"]\n\
             holds = \"what is in it\"\n\
             bound = \"what bounds it, by the code: {{NAME_OF_THE_CONSTANT}}\"\n\
             full = \"what happens then\"\n"
        );
    }
    out
}

/// The containers that are found in a source.
fn found(text: &str) -> Vec<String> {
    let sources = Sources::of([("a/src/b.rs".to_owned(), text.to_owned())]);
    let found = sources.containers().into_keys();
    found.map(|(_, field)| field).collect()
}

#[test]
fn fields_of_structs_enums_and_statics_are_found() {
    assert_eq!(
        found(
            r##"
            // struct Not { a: BTreeMap<u8, u8> }
            /// See `struct NorThis { a: HashMap<u8, u8> }`.
            #[derive(Debug)]
            pub(crate) struct Named<'a, T: Fn(u8) -> bool>
            where
                T: Send,
            {
                /// Of one, two.
                pub one: std::collections::BTreeMap<u8, (u8, Vec<u8>)>,
                #[allow(dead_code, reason = "x, y: VecDeque<u8>")]
                pub(super) two: Mutex<Option<VecDeque<T>>>,
                plain: &'a [u8],
                call: Box<dyn Fn(u8, u8) -> BinaryHeapless<u8>>,
                turns: Arc<Semaphore>,
                aliased: Slots,
                #[cfg(test)]
                seen: BTreeSet<u8>,
                last: BinaryHeap<u8>
            }
            type Slots = Arc<Mutex<HashMap<u8, u8>>>;
            struct Tuple(u8, pub DashMap<u8, u8>);
            struct Unit;
            enum Phase {
                Idle,
                Busy { since: u8, queue: VecDeque<u8> },
                Over(HashSet<u8>),
            }
            static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
            const TEXT: &str = "struct Quoted { a: BTreeMap<u8, u8> }";
            const RAW: &str = r#"struct " { a: BTreeMap<u8, u8> }"#;
            fn brief() -> char { let _brief: BTreeMap<u8, u8> = BTreeMap::new(); '"' }
            "##
        ),
        [
            "NAMES",
            "Named.aliased",
            "Named.last",
            "Named.one",
            "Named.turns",
            "Named.two",
            "Phase.Busy",
            "Phase.Over",
            "Tuple.1",
        ]
    );
    // An alias counts where it has what it is made of, as in `type Fingerprints<V> = HashMap<u64, V>`.
    assert_eq!(
        found("type Many<V> = HashMap<u64, V>; struct A { all: Many<u8>, not: HowMany<u8> }"),
        ["A.all"]
    );
}

#[test]
fn channels_and_sets_of_tasks_are_found_by_who_makes_them() {
    assert_eq!(
        found(
            "use tokio::sync::mpsc;
            fn first() { let (a, b) = mpsc::channel(8); let (c, d) = oneshot::channel(); }
            impl A { pub(crate) async fn second<T>(&self) { let x = mpsc::unbounded_channel::<T>(); } }
            fn third() { let (a, b) = watch::channel(1); let tasks = JoinSet::new(); }"
        ),
        ["first(): channel", "second(): channel", "third(): tasks"]
    );
    assert_eq!(
        found(
            "use crossbeam::channel::{Receiver, bounded};
            fn fourth() { let (a, b) = bounded(8); }
            fn fifth() { let x = crossbeam_channel::unbounded::<u8>(); let y = oneshot::channel(); }"
        ),
        ["fifth(): channel", "fourth(): channel"]
    );
    // Somebody's own function of that name.
    assert_eq!(
        found("fn bounded(a: u8) -> u8 { a } fn f() { bounded(1); Vec::new(); }"),
        [""; 0]
    );
}

#[test]
fn what_is_for_tests_is_not_looked_at() {
    let text = "
        #[cfg(test)]
        mod model;
        #[cfg(test)]
        #[path = \"elsewhere.rs\"]
        pub(crate) mod helpers;
        #[cfg(test)]
        fn helper(a: u8, b: BTreeMap<u8, u8>) -> u8 { struct Local { a: BTreeMap<u8, u8> } 1 }
        struct Kept { a: BTreeMap<u8, u8> }
        #[cfg(test)]
        mod tests { struct World { hosts: BTreeMap<u8, u8> } }";
    let world = "struct Model { a: BTreeMap<u8, u8> }";
    let sources = Sources::of([
        ("a/src/b/mod.rs".to_owned(), text.to_owned()),
        ("a/src/b/model.rs".to_owned(), world.to_owned()),
        ("a/src/b/helpers/deep.rs".to_owned(), world.to_owned()),
        ("a/src/b/models.rs".to_owned(), world.to_owned()),
    ]);
    let found: Vec<_> = sources.containers().into_keys().collect();
    assert_eq!(
        found,
        [
            ("a/src/b/mod.rs".to_owned(), "Kept.a".to_owned()),
            ("a/src/b/models.rs".to_owned(), "Model.a".to_owned()),
        ]
    );
}

#[test]
fn a_container_without_a_row_and_a_row_without_a_container_are_named_with_what_to_do() {
    let source = |text: &str| Sources::of([("a/src/b.rs".to_owned(), text.to_owned())]);
    let rows = |fields: &str| {
        Bounds::read(&format!(
            "[[part]]\ntitle = \"A\"\nabout = \"\"\n[[part.row]]\nfile = \"a/src/b.rs\"\nfields = [{fields}]\n\
             holds = \"h\"\nbound = \"{{MOST}}\"\nfull = \"f\"\n"
        ))
    };
    let code = "const MOST: usize = 1 << 12; struct A { one: BTreeMap<u8, u8>, two: Vec<u8> } fn run() { let local = 1; }";
    assert_eq!(
        wrong(
            &rows("\"A.one\", \"A.two\", \"run(): local\""),
            &source(code)
        ),
        ""
    );

    let missing = wrong(&rows("\"A.two\""), &source(code));
    assert!(
        missing.contains("a/src/b.rs: A.one (BTreeMap<u8, u8>) has no row"),
        "{missing}"
    );
    assert!(
        missing.contains("[[part.row]]\nfile = \"a/src/b.rs\"\nfields = [\"A.one\"]\n"),
        "{missing}"
    );
    let gone = wrong(&rows("\"A.one\", \"A.three\""), &source(code));
    assert_eq!(
        gone,
        "\na/src/b.rs has no A.three any more: take it out of docs/bounds.toml\n"
    );
    let twice = wrong(&rows("\"A.one\", \"A.one\""), &source(code));
    assert_eq!(
        twice,
        "\nA.one of a/src/b.rs is twice in docs/bounds.toml\n"
    );

    let page = rows("\"A.one\"").page(&source(code)).unwrap();
    assert!(
        page.contains("| h | 4,096 (`MOST`) | f | `A.one` in a::b |"),
        "{page}"
    );
    let none = rows("\"A.one\"").page(&source("struct A { one: u8 }"));
    assert!(none.unwrap_err().contains("there is no one value of MOST"));
}

#[test]
fn values_are_written_for_people() {
    assert_eq!(shown("4_096", false), "4,096");
    assert_eq!(shown("1 << 20", false), "1,048,576");
    assert_eq!(shown("64 << 20", true), "64 MiB");
    assert_eq!(shown("1_500", true), "1,500 bytes");
    assert_eq!(shown("2 * 1_000", false), "2,000");
    assert_eq!(shown("Duration::from_secs(30)", false), "30 s");
    assert_eq!(shown("2 * MAX_CHUNKS", false), "2 * MAX_CHUNKS");
}
