//! The example without machine learning, `pipelines/words.yaml`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::space::Space;

fn words() -> Space {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let space = Space::new(&fs::read_to_string(folder.join("words.yaml")).unwrap());
    let (from, to) = (folder.join("words"), space.path("words"));
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).status().unwrap();
    assert!(copied.success());
    space
}

#[test]
fn words_are_counted_and_drawn_and_a_change_reruns_what_it_touches() {
    let space = words();
    let first = space.pipe(&["run"]).code(0).err;
    assert!(first.contains("4 run, 0 reused"), "{first}");
    space.pipe(&["outputs", "table", "--to", "kept"]).code(0);
    space.pipe(&["outputs", "chart", "--to", "kept"]).code(0);
    let table = fs::read_to_string(space.path("kept/table.md")).unwrap();
    assert!(
        table.starts_with("| word | count |\n|---|---|\n| the | 28 |\n| and | 8 |\n"),
        "{table}"
    );
    let chart = fs::read_to_string(space.path("kept/chart.svg")).unwrap();
    assert_eq!(chart.matches("<rect").count(), 8);

    let redrawn = space.pipe(&["run", "--set", "bars=5"]).code(0).err;
    assert!(redrawn.contains("1 run, 3 reused"), "{redrawn}");

    // Wider gaps change the text and no count.
    let text = fs::read_to_string(space.path("words/station.txt")).unwrap();
    space.write("words/station.txt", &text.replace(' ', "  "));
    let plan = space.pipe(&["plan"]).code(0).out;
    assert!(plan.contains("(from words): changed station.txt"), "{plan}");
    let cut = space.pipe(&["run"]).code(0).err;
    assert!(cut.contains("1 run, 3 reused (1 by early cutoff)"), "{cut}");

    space.write("words/more.txt", "words words words");
    let more = space.pipe(&["run"]).code(0).err;
    assert!(more.contains("4 run, 0 reused"), "{more}");
}
