//! `pipe doctor`: what it looks at, what it leaves behind, and when it fails.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::space::{DIAMOND, Space};

fn checks(space: &Space, args: &[&str], code: i32) -> Vec<Value> {
    let all = [args, &["doctor", "--json"]].concat();
    serde_json::from_str(&space.pipe(&all).code(code).out).unwrap()
}

fn status<'a>(checks: &'a [Value], name: &str) -> &'a str {
    let check = checks.iter().find(|c| c["name"] == name);
    check.unwrap_or_else(|| panic!("no `{name}`"))["status"].as_str().unwrap()
}

#[test]
fn the_file_system_is_tried_and_nothing_is_left_behind() {
    let space = Space::new(DIAMOND);
    let cache = space.path("elsewhere/cache");
    let found = checks(&space, &["--cache", cache.to_str().unwrap()], 0);
    for name in ["cache", "locks", "replacement"] {
        assert_eq!(status(&found, name), "ok", "{name}");
    }
    for name in ["free space", "links", "file times", "GPU", "Python", "git", "terminal", "locale"]
    {
        status(&found, name);
    }
    assert!(!space.path("elsewhere").exists());
    space.pipe(&["run"]).code(0);
    let tmp = space.cache().join("tmp");
    let left = || fs::read_dir(&tmp).map_or(0, Iterator::count);
    let before = left();
    checks(&space, &[], 0);
    assert_eq!(left(), before);
}

#[test]
fn whatever_is_not_fine_says_what_to_do_and_a_failure_has_an_exit_code() {
    // Nobody can write there, root neither.
    let cache = Path::new("/proc/none/cache");
    let space = Space::new(DIAMOND);
    let found = checks(&space, &["--cache", cache.to_str().unwrap()], 5);
    assert_eq!(status(&found, "cache"), "fail");
    for check in &found {
        assert_eq!(check["status"] != "ok", check["help"].is_string(), "{check}");
    }
}

#[test]
fn a_broken_pipeline_is_no_obstacle() {
    let space = Space::new("stages: [");
    space.pipe(&["doctor"]).code(0);
}
