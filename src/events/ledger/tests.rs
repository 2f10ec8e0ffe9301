//! The ledger over lives that end at any place: whatever was released, what a restart finds is what was there.

use super::*;
use crate::model::event::NewEvent;
use crate::model::task::{Limits, ModelChoice, Provider};
use crate::model::{Reason, Status, Task, TaskId};
use chrono::TimeDelta;
use proptest::prelude::*;
use serde_json::json;
use uuid::Uuid;

fn at(second: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000 + second, 0).unwrap()
}

fn record(number: u128) -> ExecutionRecord {
    let model = ModelChoice::new(Provider::Local, "m", "http://127.0.0.1:1/v1");
    let task = Task::new(TaskId(Uuid::from_u128(number)), "x", model, 1, Limits::default());
    let mut record = ExecutionRecord::new("p", Uuid::nil(), task, Vec::new(), at(number as i64));
    record.id = ExecutionId(Uuid::from_u128(number));
    record.session_id = SessionId(Uuid::from_u128(number));
    record.idempotency = number.is_multiple_of(2).then(|| Idempotency {
        caller: "me".into(),
        key: format!("k{}", number % 6).parse().unwrap(),
        fingerprint: Fingerprint([number as u8; 32]),
    });
    record
}

/// What happens to one of a few executions; what does not follow from how it stands does not happen.
#[derive(Clone, Debug)]
enum Step {
    Submit,
    Output,
    Call(u8),
    Result(u8),
    Run,
    Conversation,
    End(bool),
    Delete,
}

fn step() -> impl Strategy<Value = (u128, Step)> {
    let step = prop_oneof![
        3 => Just(Step::Submit),
        3 => Just(Step::Output),
        3 => (0..3u8).prop_map(Step::Call),
        2 => (0..3u8).prop_map(Step::Result),
        2 => Just(Step::Run),
        1 => Just(Step::Conversation),
        1 => any::<bool>().prop_map(Step::End),
        1 => Just(Step::Delete),
    ];
    (1..6u128, step)
}

/// The writes of a life of the log, as the writers of `live` make them.
fn writes(steps: &[(u128, Step)]) -> Vec<Write> {
    let mut records: BTreeMap<u128, ExecutionRecord> = BTreeMap::new();
    let mut writes = Vec::new();
    for (number, step) in steps {
        let known = records.get_mut(number);
        let execution = ExecutionId(Uuid::from_u128(*number));
        let mut event = |record: &mut ExecutionRecord, event: NewEvent| {
            record.last_seq += 1;
            writes.push(Write::Event { execution, event: event.seal(record.last_seq, at(0)) });
        };
        match (step, known) {
            (Step::Submit, None) => {
                let mut record = record(*number);
                writes.push(Write::Submit(Box::new(record.clone())));
                writes.push(Write::Local { execution, fact: Fact::Credentials(format!("sealed {number}")) });
                record.last_seq = 1;
                let first = NewEvent::status(Status::Pending, None, None).seal(1, at(0));
                writes.push(Write::Event { execution, event: first });
                records.insert(*number, record);
            }
            (_, None) => {}
            (Step::Delete, Some(record)) if record.status.is_final() => {
                writes.push(Write::Delete { project: "p".into(), execution });
            }
            (_, Some(record)) if record.status.is_final() => {}
            (Step::Output, Some(record)) => event(record, NewEvent::new(EventType::Stdout, json!("x"))),
            (Step::Call(call), Some(record)) => {
                let data = json!({ "call_id": call.to_string(), "tool": "bash", "args": { "command": "x" } });
                event(record, NewEvent::new(EventType::ToolCall, data));
            }
            (Step::Result(call), Some(record)) => {
                event(record, NewEvent::new(EventType::ToolResult, json!({ "call_id": call.to_string() })));
            }
            (Step::Run, Some(record)) => {
                let expected = record.status;
                event(record, NewEvent::status(Status::Running, None, None));
                record.status = Status::Running;
                writes.push(Write::Change { expected, record: Box::new(record.clone()) });
            }
            (Step::Conversation, Some(_)) => {
                writes.push(Write::Local { execution, fact: Fact::Conversation(format!("c{number}")) });
            }
            (Step::End(keeps_key), Some(record)) => {
                let expected = record.status;
                event(record, NewEvent::status(Status::Failed, Some(Reason::Interrupted), None));
                (record.status, record.reason) = (Status::Failed, Some(Reason::Interrupted));
                record.completed_at = Some(at(1));
                if !keeps_key {
                    record.idempotency = None;
                }
                writes.push(Write::Change { expected, record: Box::new(record.clone()) });
            }
            (Step::Submit | Step::Delete, Some(_)) => {}
        }
    }
    writes
}

fn ledger(writes: &[Write]) -> Ledger {
    let mut ledger = Ledger::default();
    writes.iter().for_each(|write| ledger.apply(write));
    ledger
}

/// What a restart cares for.
fn unfinished(ledger: &Ledger) -> Vec<Standing> {
    ledger.standing().into_iter().filter(|standing| !standing.record.status.is_final()).collect()
}

proptest! {
    /// The journal has released its first records, of which the database has at least these, and was summed up after
    /// that; the rest is read again.
    #[test]
    fn a_summary_and_what_was_not_released_are_all_of_it(
        steps in prop::collection::vec(step(), 0..60),
        places in [any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<prop::sample::Index>()],
    ) {
        let writes = writes(&steps);
        let mut places: Vec<_> = places.iter().map(|place| place.index(writes.len() + 1)).collect();
        places.sort_unstable();
        let [released, shipped, summed] = places[..] else { unreachable!() };
        let mut before = ledger(&writes[..summed]);
        for write in &writes[..shipped] {
            match write {
                Write::Change { record, .. } if record.status.is_final() => before.shipped(record.id),
                _ => {}
            }
        }
        let mut after = Ledger::of_summary(&before.to_summary()).unwrap();
        prop_assert_eq!(&after, &before);
        writes[released..].iter().for_each(|write| after.apply(write));
        let whole = ledger(&writes);
        prop_assert_eq!(unfinished(&after), unfinished(&whole));
        prop_assert_eq!(after.keys(), whole.keys());
        // What has ended and was not shipped is there too, as it ended.
        for standing in whole.standing() {
            let end = writes.iter().position(|write| matches!(write, Write::Change { record, .. }
                if record.status.is_final() && record.id == standing.record.id));
            if end.is_some_and(|end| end >= shipped) {
                prop_assert!(after.standing().contains(&standing), "{standing:?}");
            }
        }
    }
}

#[test]
fn keys_are_forgotten_when_their_time_is_over() {
    let mut ledger = ledger(&[Write::Submit(Box::new(record(2))), Write::Submit(Box::new(record(4)))]);
    assert_eq!(ledger.keys().len(), 2);
    ledger.forget_keys_before(at(4) - TimeDelta::seconds(1));
    assert_eq!(ledger.keys()[0].2.id, ExecutionId(Uuid::from_u128(4)));
    assert_eq!(ledger.keys().len(), 1);
}

#[test]
fn a_call_is_open_until_it_has_a_result() {
    let call = |id: &str, kind| NewEvent::new(kind, json!({ "call_id": id, "tool": "bash", "args": "x".repeat(9999) }));
    let events = [call("a", EventType::ToolCall), call("b", EventType::ToolCall), call("a", EventType::ToolResult)];
    let events: Vec<_> = events.into_iter().zip(1..).map(|(event, seq)| event.seal(seq, at(0))).collect();
    let open = open_tools(&events);
    assert_eq!((open.len(), open[0].call_id.as_str(), open[0].arguments.len()), (1, "b", ARGUMENTS));
}
