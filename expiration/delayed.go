package expiration

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

// Delayed is what a timer sends if it is not the closing event of an event in the room, but one that a client wants sent
// later (MSC4140 as accepted). The timer's Event says where to; its ID is the row's own then, from which the delay ID is
// derived as a refresh token is from the ID of an event.
type Delayed struct {
	// Content is a JSON object, as the client wrote it.
	Content []byte
	// Expires is for how long the event is to run once it is sent, as its content says, or 0.
	Expires time.Duration
	// Timestamp is the time that the event is to bear, as an application service may say, or zero. It has whole milliseconds,
	// and is not before 1970, of which the first moment is a time like others.
	Timestamp time.Time
	// Exempt says that the limit of running timers does not hold for the sender. Schedule sets it.
	Exempt bool
	// Over is the event that was the current state when this one was scheduled, or "".
	Over string
}

// Final says what became of a delayed event. At most one of EventID and Error is set; neither is if it was cancelled.
type Final struct {
	At      time.Time // in whole milliseconds
	EventID string
	// Error is the Matrix error with which the event was refused.
	Error json.RawMessage
}

// Sent and Cancelled report what the event came to.
func (f Final) Sent() bool { return f.EventID != "" }

func (f Final) Cancelled() bool { return f.EventID == "" && f.Error == nil }

// DelayedEvent is a delayed event as its owner sees it.
type DelayedEvent struct {
	DelayID string
	Timer   Timer
	// Final is nil while the event is scheduled.
	Final *Final
	// Place is where the event stands in the list of its owner's, or "" outside of it.
	Place string
}

// ScheduledAt returns when the delay began: when the event was scheduled, or restarted last.
func (d DelayedEvent) ScheduledAt() time.Time { return d.Timer.Deadline.Add(-d.Timer.Duration) }

// FinalisedError is the error of Restart, Send and Cancel for a delayed event that is no longer scheduled.
type FinalisedError struct{ Final Final }

func (e *FinalisedError) Error() string { return "the delayed event was finalised already" }

// RefusedError is how the homeserver refuses a send, for good: what a client would have been answered. The engine hands it on.
type RefusedError struct {
	Code     int
	Response json.RawMessage
}

func (e *RefusedError) Error() string { return fmt.Sprintf("HTTP %d: %s", e.Code, e.Response) }

// AllowDelayed is Allow for delay IDs. They are known as long as their events are scheduled.
func (t *Timers) AllowDelayed(delayID string) (known bool, wait time.Duration) {
	return t.allow(HashToken(delayID), true)
}

// RestartDelayed begins the delay of a scheduled event anew. The owner is "" if the delay ID is authority enough. The error is
// ErrNotFound if there is no such event, of this owner, and a *FinalisedError if it is no longer scheduled.
func (t *Timers) RestartDelayed(ctx context.Context, delayID, owner string) error {
	tm, err := t.delayedTimer(delayID, owner)
	if err == nil {
		err = t.refresh(ctx, tm, 0)
	}
	return t.orFinalised(ctx, delayID, owner, err)
}

// SendDelayed sends a scheduled event now. The error is that of RestartDelayed, or a *RefusedError if the event was refused,
// or a passing fault; it stays scheduled then. It is a *DropError if the event was given to its room and did not come into it, or
// cannot be sent at all.
func (t *Timers) SendDelayed(ctx context.Context, delayID, owner string) error {
	tm, err := t.delayedTimer(delayID, owner)
	if err == nil {
		err = t.endNow(ctx, tm)
	}
	return t.orFinalised(ctx, delayID, owner, err)
}

// CancelDelayed takes a scheduled event back. The error is that of RestartDelayed.
func (t *Timers) CancelDelayed(ctx context.Context, delayID, owner string) error {
	tm, err := t.delayedTimer(delayID, owner)
	if err == nil {
		err = t.cancel(ctx, tm)
	}
	return t.orFinalised(ctx, delayID, owner, err)
}

// delayed returns the timer of a delayed event that is scheduled, or being sent.
func (t *Timers) delayedTimer(delayID, owner string) (*index.Timer, error) {
	tm, sender := t.find(HashToken(delayID), true), t.tokens.names.hash(owner)
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm == nil || owner != "" && tm.Sender() != sender {
		return nil, ErrNotFound
	}
	return tm, nil
}

// sendDelayed is what closing is for a delayed event.
func (t *Timers) sendDelayed(ctx context.Context, tm *index.Timer, row *Timer, o Outcome, due time.Duration, w *lanes.Turn) error {
	if row.Event.StateKey != nil {
		replaced, err := t.roomserver.Replaced(ctx, *row)
		if err != nil {
			return err
		}
		if replaced {
			return &DropError{Reason: Replaced}
		}
	}
	var pending *Pending
	sent := false
	defer func() { // also after a panic
		if pending != nil {
			pending.Activate(sent)
		}
	}()
	eventID, err := t.roomserver.Send(ctx, *row, o, func(ctx context.Context, b Built) (err error) {
		if row.Event.StateKey != nil { // a send that went past this one may have come meanwhile, see LockState
			if replaced, err := t.roomserver.Replaced(ctx, *row); err != nil || replaced {
				return cmp.Or(err, error(&DropError{Reason: Replaced}))
			}
		}
		if row.Delayed.Expires > 0 {
			e := Event{ID: b.EventID, RoomID: b.RoomID, Type: b.Type, StateKey: b.StateKey, Sender: row.Event.Sender}
			if !b.Closable {
				return ErrTooLarge
			}
			if pending, err = t.Begin(ctx, e, row.Delayed.Expires, row.Delayed.Exempt); err != nil {
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
		return follow(ctx, w, c.Event, !row.Event.decides())
	})
	sent = err == nil
	if err == nil && row.Claim == nil { // the room has the same state already, and gets no event
		row.Claim = &Claim{Outcome: o, Event: SignedEvent{EventID: eventID}}
		err = t.claim(ctx, tm, due, *row.Claim)
	}
	if o == Expired { // and nobody waits for the answer
		if errors.Is(err, ErrTooLarge) || errors.As(err, new(*LimitError)) || errors.As(err, new(*RefusedError)) {
			return &DropError{Reason: Forbidden, Cause: err}
		}
	}
	return err
}

// DelayedEvent returns one delayed event, of this owner if he is not "", scheduled or finalised, or ErrNotFound.
func (t *Timers) DelayedEvent(ctx context.Context, delayID, owner string) (DelayedEvent, error) {
	tm, err := t.delayedTimer(delayID, owner)
	if err == nil {
		row, _, err := t.load(ctx, tm)
		switch {
		case err == nil && row.Claim == nil:
			return DelayedEvent{DelayID: delayID, Timer: row}, nil
		case err == nil:
			return DelayedEvent{DelayID: delayID, Timer: row, Final: &Final{
				At: t.clock.stored(t.clock.now()), EventID: row.Claim.Event.EventID,
			}}, nil
		case !errors.Is(err, ErrNotFound):
			return DelayedEvent{}, err
		}
	}
	d, err := t.store.Finalised(ctx, HashToken(delayID))
	switch {
	case errors.Is(err, ErrNotFound) || err == nil && owner != "" && owner != d.Timer.Event.Sender:
		return DelayedEvent{}, ErrNotFound
	case err != nil:
		return DelayedEvent{}, fmt.Errorf("looking for a finalised event: %w", err)
	}
	d.DelayID = delayID
	return d, nil
}
