//! What a stage requires of the provenance of what it reuses.

use std::fs;

use pipe::record::Record;

use crate::space::{DIAMOND, Space};

fn require(space: &Space, version: &str) {
    let stage = "  left:\n    kind: command\n";
    space.replace(stage, &format!("{stage}    require: {{pipe: {version}}}\n"));
}

#[test]
fn record_that_does_not_meet_a_requirement_is_replaced_by_an_equal_one_that_does() {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    // An earlier `pipe` made what `left` is.
    for entry in fs::read_dir(space.cache().join("records-v1/command")).unwrap().flatten() {
        let mut record = Record::from_text(&fs::read(entry.path()).unwrap()).unwrap();
        record.provenance.insert("pipe".to_owned(), "0.0.1".into());
        fs::write(entry.path(), record.to_text().unwrap()).unwrap();
    }
    space.pipe(&["plan", "--check"]).code(0);
    require(&space, env!("CARGO_PKG_VERSION"));
    space.pipe(&["run"]).code(0);
    assert_eq!(space.all_runs(), [2, 1, 1, 1]);
    space.pipe(&["run"]).code(0);
    assert_eq!(space.all_runs(), [2, 1, 1, 1]);
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn version_that_this_is_not_is_refused_before_the_stage_runs() {
    let space = Space::new(DIAMOND);
    require(&space, "never");
    let ran = space.pipe(&["run", "left"]).code(4);
    assert!(ran.err.contains("requires pipe = \"never\""), "{}", ran.err);
    assert!(ran.err.contains("it was not run"), "{}", ran.err);
    assert_eq!(space.runs("left"), 0);
}
