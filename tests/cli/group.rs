//! A cache in a folder that is made for a group, filled by somebody whose umask keeps everybody out.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use crate::space::{Ran, Space, ran, through};

/// Files, a folder, a program, and a link to an input.
const ALL_FORMS: &str = r"
stages:
  file:
    kind: command
    params: {run: 'echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}
  folder:
    kind: command
    inputs: {a: file}
    params: {run: 'cd $PIPE_OUTPUT_OUT; echo 2 > 2; echo 3 > 3; chmod +x 3; ln $PIPE_INPUT_A 4', outputs: {out: {dir: out}}}
";

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A run under a umask of 077 into a cache of this mode.
fn filled(around: u32) -> Space {
    let space = Space::new(ALL_FORMS);
    fs::create_dir(space.cache()).unwrap();
    set_mode(&space.cache(), around);
    let alone = ["sh", "-c", "umask 077; exec \"$@\"", "sh"];
    ran(&through(&alone, &space.command(&["run"])).output().unwrap()).code(0);
    space
}

fn doctor(space: &Space) -> Ran {
    space.pipe(&["doctor"]).code(0)
}

#[test]
fn objects_in_a_cache_for_a_group_are_open_to_the_group_whatever_the_umask() {
    for (around, wanted) in [(0o2770, 0o440), (0o770, 0o400)] {
        let space = filled(around);
        assert_eq!(space.objects().len(), 4, "three files and a listing");
        for object in space.objects() {
            assert_eq!(mode(&object), wanted, "{around:o} {}", object.display());
        }
        assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    }
}

#[test]
fn doctor_finds_an_object_that_is_closed_to_the_group() {
    let space = filled(0o2770);
    assert!(doctor(&space).out.contains("nothing that was looked at keeps anybody"));
    set_mode(&space.objects()[0], 0o400);
    let found = doctor(&space).out;
    assert!(found.contains("mode 0400 and keeps its group out"), "{found}");
}

#[test]
fn what_doctor_says_opens_a_cache_to_the_group_and_leaves_its_objects_read_only() {
    let space = filled(0o770);
    set_mode(&space.cache(), 0o2770);
    let checks = space.pipe(&["doctor", "--json"]).code(0).out;
    let checks: Vec<serde_json::Value> = serde_json::from_str(&checks).unwrap();
    let check = checks.iter().find(|check| check["name"] == "sharing").unwrap();
    let commands = check["help"].as_str().unwrap().split('`').nth(1).unwrap();
    assert!(commands.starts_with("chmod"), "{commands}");
    fs::create_dir_all(space.cache().join("leases")).unwrap();
    assert!(Command::new("sh").args(["-c", commands]).status().unwrap().success());
    for object in space.objects() {
        assert_eq!(mode(&object), 0o440, "{}", object.display());
    }
    assert!(doctor(&space).out.contains("nothing that was looked at keeps anybody"));
}
