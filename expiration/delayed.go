package expiration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// Delayed describes the event that the timer of a delayed event sends later (docs/delayed-events.md). The timer's Event says which room,
// type and state key it has. Event.ID is random: the delay ID is derived from it as a refresh token is derived from an event ID.
type Delayed struct {
	// Content is a JSON object, as the client wrote it.
	Content []byte
	// Expires is how long the event runs as an expiring event once it is sent, as its content says, or 0.
	Expires time.Duration
	// Timestamp is the origin_server_ts that an application service asked for, or zero. It has whole milliseconds and is not before 1970.
	// The first moment of 1970 is a valid time, and not zero.
	Timestamp time.Time
	// Service says that an application service has scheduled the event. It has no limit of running timers or of sends. Schedule sets it.
	Service bool
}

// Final is the result of a delayed event. At most one of EventID and Error is set; neither is set if the event was cancelled.
type Final struct {
	At      time.Time // in whole milliseconds
	EventID string
	// Existed says that the room had the same state already, as event EventID. That event was not sent as a delayed event.
	Existed bool
	// Error is the Matrix error with which the event was refused.
	Error json.RawMessage
}

// Sent reports whether the event was sent.
func (f Final) Sent() bool { return f.EventID != "" }

// Cancelled reports whether the event was cancelled.
func (f Final) Cancelled() bool { return f.EventID == "" && f.Error == nil }

// DelayedEvent is a delayed event as its owner sees it.
type DelayedEvent struct {
	DelayID string
	Timer   Timer
	// Final is nil while the event is scheduled. It is nil too while the event is on its way into its room: that can still fail.
	Final *Final
	// Place is the position of the event in its owner's list, or "" if the event was not listed.
	Place string
}

// DelayedSince returns when the delay began: when the event was scheduled or last restarted.
func (d DelayedEvent) DelayedSince() time.Time { return d.Timer.Deadline.Add(-d.Timer.Duration) }

// FinalisedError is the error of RestartDelayed, SendDelayed and CancelDelayed for an event that is finalised. An event that is on its way
// into its room counts as sent, because it can be taken back no more.
type FinalisedError struct{ Final Final }

func (e *FinalisedError) Error() string { return "the delayed event is already finalised" }

// RefusedError says that the homeserver refuses a send for good. It holds the answer that a client would get, which the engine only passes
// on.
type RefusedError struct {
	Code     int
	Response json.RawMessage
}

func (e *RefusedError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.Code, e.Response) }

// AllowDelayed is Allow for delay IDs. A delay ID is known while its event is scheduled or being sent.
func (t *Timers) AllowDelayed(delayID string) (known bool, wait time.Duration) {
	return t.allow(HashToken(delayID), true)
}

// RestartDelayed restarts the delay of a scheduled event. The owner is "" if the delay ID alone is sufficient authority. The error is
// ErrNotFound if the owner has no such event, and a *FinalisedError if the event is on its way or finalised.
func (t *Timers) RestartDelayed(ctx context.Context, delayID, owner string) error {
	return t.onDelayed(ctx, HashToken(delayID), owner, func(tm *index.Timer) error { return t.refresh(ctx, tm, 0) })
}

// SendDelayed sends a scheduled event now. It returns an error of RestartDelayed, or one of these:
//
//   - a *RefusedError or an *UnsendableError if the event could not be sent, or a passing fault: the event stays scheduled, or, if it was
//     claimed, is tried again;
//   - a *DropError if the event will never be sent, because its sender or its room is gone.
func (t *Timers) SendDelayed(ctx context.Context, delayID, owner string) error {
	return t.sendNow(ctx, HashToken(delayID), owner)
}

// sendNow is SendDelayed by the hash of the delay ID.
func (t *Timers) sendNow(ctx context.Context, h TokenHash, owner string) error {
	return t.onDelayed(ctx, h, owner, func(tm *index.Timer) error { return t.endNow(ctx, tm) })
}

// CancelDelayed cancels a scheduled event. Its errors are those of RestartDelayed.
func (t *Timers) CancelDelayed(ctx context.Context, delayID, owner string) error {
	return t.onDelayed(ctx, HashToken(delayID), owner, func(tm *index.Timer) error { return t.cancel(ctx, tm) })
}

// onDelayed acts on a delayed event. It replaces ErrNotFound and a *DropError by a *FinalisedError if the event is on its way or finalised.
func (t *Timers) onDelayed(ctx context.Context, h TokenHash, owner string, act func(*index.Timer) error) error {
	tm, err := t.delayedTimer(h, owner)
	if err == nil {
		err = act(tm)
	}
	var dropped *DropError
	if !errors.Is(err, ErrNotFound) && !errors.As(err, &dropped) || dropped != nil && reasons[dropped.Reason].refusal {
		return err
	}
	d, err := t.delayedEvent(ctx, h, owner)
	switch {
	case err != nil:
		return err
	case d.Final != nil:
		return &FinalisedError{*d.Final}
	case d.Timer.Claim != nil: // it is on its way
		return &FinalisedError{Final{EventID: d.Timer.Claim.Event.EventID}}
	}
	return ErrNotFound
}

// delayedTimer returns the timer of a delayed event that is scheduled or being sent. An owner of "" matches every sender.
func (t *Timers) delayedTimer(h TokenHash, owner string) (*index.Timer, error) {
	tm, sender := t.find(h, true), t.tokens.names.hash(owner)
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm == nil || owner != "" && tm.Sender() != sender {
		return nil, ErrNotFound
	}
	return tm, nil
}

// sendDelayed is the counterpart of Roomserver.Close for a delayed event: it builds, claims and sends it.
func (t *Timers) sendDelayed(ctx context.Context, tm *index.Timer, row *Timer, o Outcome, due time.Duration, w *lanes.Turn) error {
	var pending *Pending
	sent := false
	defer func() { // also after a panic
		if pending != nil {
			pending.Activate(sent)
		}
	}()
	eventID, err := t.roomserver.Send(ctx, *row, o, func(ctx context.Context, b Built) (err error) {
		if o == Expired && !row.Delayed.Service {
			if err = t.countDue(tm); err != nil {
				return err
			}
			defer func() { // also after a panic
				if row.Claim == nil {
					t.uncountDue(tm)
				}
			}()
		}
		if row.Delayed.Expires > 0 {
			e := Event{ID: b.EventID, RoomID: b.RoomID, Type: b.Type, StateKey: b.StateKey, Sender: row.Event.Sender}
			if !b.Closable {
				return ErrTooLarge
			}
			if pending, err = t.Begin(ctx, e, row.Delayed.Expires, row.Delayed.Service); err != nil {
				return err
			}
		}
		c := Claim{Outcome: o, Event: b.Signed()}
		if err = t.claim(ctx, tm, due, c); err != nil {
			if pending != nil && !pending.existed && !maybeWritten(err) {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
				defer cancel()
				t.drop(ctx, pending.timer, NeverSent)
			}
			return err
		}
		row.Claim = &c
		t.noteInFlight(tm, *row)
		return follow(ctx, w, c.Event, !row.Event.affectsAuth())
	})
	sent = err == nil
	if err == nil && row.Claim == nil { // the room already has the same state, so no event was built
		c := Claim{Outcome: o, Event: SignedEvent{EventID: eventID}}
		if err = t.claim(ctx, tm, due, c); err == nil {
			row.Claim = &c
		}
	}
	if o == Expired { // nobody waits for the answer
		if errors.Is(err, ErrTooLarge) || errors.As(err, new(*LimitError)) || errors.As(err, new(*RefusedError)) {
			return &DropError{Reason: Forbidden, Cause: err}
		}
	}
	return err
}

// countDue returns a *LimitError if too many delayed events of the sender were due lately. Such an event is not tried again. A request to
// send counts as a request instead.
func (t *Timers) countDue(tm *index.Timer) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	sent := t.due[tm.Sender()]
	if wait := sent.Take(t.cfg.DueLimit, t.clock.now()); wait > 0 {
		return &LimitError{RetryAfter: wait}
	}
	t.due[tm.Sender()] = sent
	return nil
}

// uncountDue undoes countDue for an event that was not claimed. The event counts when it is sent, however many attempts that takes.
func (t *Timers) uncountDue(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	sent := t.due[tm.Sender()]
	sent.Return(t.cfg.DueLimit)
	t.due[tm.Sender()] = sent
}

// DelayedEvent returns a delayed event, scheduled or finalised, or ErrNotFound. An owner of "" matches every sender.
func (t *Timers) DelayedEvent(ctx context.Context, delayID, owner string) (DelayedEvent, error) {
	d, err := t.delayedEvent(ctx, HashToken(delayID), owner)
	if err == nil {
		d.DelayID = delayID
	}
	return d, err
}

// delayedEvent is DelayedEvent by the hash of the delay ID, without the delay ID in the result.
func (t *Timers) delayedEvent(ctx context.Context, h TokenHash, owner string) (DelayedEvent, error) {
	tm, err := t.delayedTimer(h, owner)
	if err == nil {
		row, _, err := t.load(ctx, tm)
		switch {
		case err == nil:
			return DelayedEvent{Timer: row}, nil
		case !errors.Is(err, ErrNotFound):
			return DelayedEvent{}, err
		}
	}
	d, err := t.store.Finalised(ctx, h)
	switch {
	case errors.Is(err, ErrNotFound) || err == nil && owner != "" && owner != d.Timer.Event.Sender:
		return DelayedEvent{}, ErrNotFound
	case err != nil:
		return DelayedEvent{}, fmt.Errorf("looking up a finalised event: %w", err)
	}
	return d, nil
}
