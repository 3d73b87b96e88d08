//! Random graphs with random failures: what runs, in which order, and what a failure stops.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;

use proptest::prelude::*;
use serde_json::Value;

use crate::space::Space;

const STAGES: usize = 7;

/// Stage `i` writes its ancestors and itself; it fails if it is told to and nobody has mended it.
fn pipeline(needs: &[BTreeSet<usize>], failing: &BTreeSet<usize>) -> String {
    let mut text = "stages:\n".to_owned();
    for (stage, from) in needs.iter().enumerate() {
        let inputs: Vec<String> = from.iter().map(|n| format!("i{n}: s{n}")).collect();
        let fails = if failing.contains(&stage) { "test -e $RUNS/mended || exit 3; " } else { "" };
        let _ = writeln!(
            text,
            "  s{stage}: {{kind: command, pass_env: [RUNS], inputs: {{{}}}, params: {{run: \
             'echo +{stage} >> $RUNS/order; {fails}(cat /dev/null $(env | grep ^PIPE_INPUT_ | cut -d= -f2); \
             echo {stage}) | sort -u > $PIPE_OUTPUT_O; echo -{stage} >> $RUNS/order', outputs: {{o: {{file: o}}}}}}}}",
            inputs.join(", ")
        );
    }
    text
}

fn ancestors(needs: &[BTreeSet<usize>], stage: usize) -> BTreeSet<usize> {
    let mut all = needs[stage].clone();
    for near in &needs[stage] {
        all.extend(ancestors(needs, *near));
    }
    all
}

fn events(out: &str, name: &str) -> Vec<Value> {
    let all = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    all.filter(|event| event["event"] == name).collect()
}

fn stages(events: &[Value]) -> BTreeSet<usize> {
    events.iter().map(|e| e["stage"].as_str().unwrap()[1..].parse().unwrap()).collect()
}

/// Every stage began after all that it needs had ended.
fn in_order(order: &str, needs: &[BTreeSet<usize>]) -> Result<(), TestCaseError> {
    let lines: Vec<&str> = order.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        if let Some(stage) = line.strip_prefix('+') {
            for from in &needs[stage.parse::<usize>().unwrap()] {
                let ended = format!("-{from}");
                prop_assert!(lines[..at].contains(&ended.as_str()), "{order}");
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn failures_stop_what_is_below_them_and_nothing_else(
        bits in prop::collection::vec(prop::bool::weighted(0.3), STAGES * (STAGES - 1) / 2),
        failing in prop::collection::btree_set(0..STAGES, 0..3),
        keep_going: bool,
        jobs in 1..4_usize,
    ) {
        let mut bits = bits.into_iter();
        let needs: Vec<BTreeSet<usize>> =
            (0..STAGES).map(|to| (0..to).filter(|_| bits.next().unwrap()).collect()).collect();
        let space = Space::new(&pipeline(&needs, &failing));
        let jobs = jobs.to_string();
        let mut args = vec!["--json", "run", "--jobs", jobs.as_str()];
        args.extend(keep_going.then_some("--keep-going"));
        let run = space.pipe(&args);
        let (done, failed) = (stages(&events(&run.out, "stage-finished")), stages(&events(&run.out, "stage-failed")));
        let skipped = events(&run.out, "stage-skipped");
        prop_assert_eq!(run.code, Some(if failing.is_empty() { 0 } else { 4 }), "{}", run.err);
        in_order(&fs::read_to_string(space.outside().join("runs/order")).unwrap_or_default(), &needs)?;

        let stopped = |stage: usize| failing.contains(&stage) || !ancestors(&needs, stage).is_disjoint(&failing);
        let sound: BTreeSet<usize> = (0..STAGES).filter(|s| !stopped(*s)).collect();
        let first: BTreeSet<usize> =
            failing.iter().copied().filter(|s| ancestors(&needs, *s).is_disjoint(&failing)).collect();
        if keep_going || failing.is_empty() {
            prop_assert_eq!((&done, &failed), (&sound, &first));
            let below: BTreeSet<usize> = (0..STAGES).filter(|s| stopped(*s) && !first.contains(s)).collect();
            prop_assert_eq!(stages(&skipped), below);
        } else {
            prop_assert!(done.is_subset(&sound) && failed.is_subset(&first) && !failed.is_empty());
        }
        for event in &skipped {
            let (stage, cause) = (stages(std::slice::from_ref(event)), event["because_of"].as_str().unwrap());
            let cause: usize = cause[1..].parse().unwrap();
            prop_assert!(failed.contains(&cause));
            prop_assert!(ancestors(&needs, *stage.first().unwrap()).contains(&cause));
        }

        fs::write(space.outside().join("runs/mended"), "").unwrap();
        let again = space.pipe(&["--json", "run"]);
        prop_assert_eq!(again.code, Some(0), "{}", again.err);
        prop_assert_eq!(stages(&events(&again.out, "stage-reused")), done);
        for stage in 0..STAGES {
            let name = format!("s{stage}");
            let to = format!("kept/{name}");
            prop_assert_eq!(space.pipe(&["outputs", &name, "--to", &to]).code, Some(0));
            let found = fs::read_to_string(space.path(&to).join("o")).unwrap();
            let mut wanted = ancestors(&needs, stage);
            wanted.insert(stage);
            let wanted: String = wanted.iter().map(|s| format!("{s}\n")).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
