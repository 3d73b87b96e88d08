//! What `-v`, `-vv`, `PIPE_LOG` and `--log-file` add to a run.

use std::fs;

use serde_json::Value;

use crate::space::{DIAMOND, Ran, Space, ran};

/// What the engine says of a damaged object.
const SAID: &str = "moved a damaged file to the quarantine";

/// A project whose next run finds a damaged object.
fn damaged() -> Space {
    let space = Space::new(DIAMOND);
    space.pipe(&["run"]).code(0);
    damage(&space);
    space
}

fn damage(space: &Space) {
    let object = &space.objects()[0];
    fs::remove_file(object).unwrap();
    fs::write(object, "other bytes").unwrap();
}

fn run(filter: Option<&str>, args: &[&str]) -> Ran {
    let space = damaged();
    let mut command = space.command(&[&["run"][..], args].concat());
    ran(&command.envs(filter.map(|filter| ("PIPE_LOG", filter))).output().unwrap())
}

#[test]
fn verbose_shows_the_stages_lines_and_twice_the_engine_s() {
    let quiet = run(None, &[]).code(0).err;
    assert!(!quiet.contains(": $ echo x") && !quiet.contains(SAID), "{quiet}");
    let verbose = run(None, &["-v"]).code(0).err;
    assert!(verbose.contains(": $ echo x") && !verbose.contains(SAID), "{verbose}");
    let twice = run(None, &["-vv"]).code(0).err;
    assert!(twice.contains(": $ echo x") && twice.contains(SAID), "{twice}");
}

#[test]
fn variable_filters_what_the_engine_says() {
    let warnings = run(Some("pipe=warn"), &[]).code(0).err;
    assert!(warnings.contains(SAID) && !warnings.contains(": $ echo x"), "{warnings}");
    // It comes before `-vv`.
    for filter in ["pipe=error", "other=debug"] {
        let less = run(Some(filter), &["-vv"]).code(0).err;
        assert!(!less.contains(SAID), "{less}");
    }
    let wrong = run(Some("pipe=loud"), &[]).code(2).err;
    assert!(wrong.contains("PIPE_LOG `pipe=loud` is no filter"), "{wrong}");
    assert!(wrong.contains("for example `pipe=debug`"), "{wrong}");
}

#[test]
fn log_file_gains_what_the_engine_says_as_json_lines() {
    let space = damaged();
    let run = |args: &[&str]| {
        let err = space.pipe(&[&["run"][..], args].concat()).code(0).err;
        assert!(!err.contains(SAID), "{err}");
        fs::read_to_string(space.path("engine.log")).unwrap()
    };
    let first = run(&["--log-file", "engine.log"]);
    let lines: Vec<Value> = first.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let said = lines.iter().find(|line| line["fields"]["message"] == SAID).expect(&first);
    assert_eq!(said["level"], "WARN");
    let path = said["fields"]["path"].as_str().unwrap();
    assert!(path.starts_with(space.cache().to_str().unwrap()), "{path}");
    damage(&space);
    let both = run(&["--log-file", "engine.log"]);
    assert!(both.starts_with(&first) && both.matches(SAID).count() == 2, "{both}");
    let nowhere = space.pipe(&["run", "--log-file", "no/such/folder/log"]).code(2).err;
    assert!(nowhere.contains("could not open no/such/folder/log"), "{nowhere}");
    assert!(nowhere.contains("takes a file that can be written"), "{nowhere}");
}
