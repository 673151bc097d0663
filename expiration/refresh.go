package expiration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// Allow reports whether this server issued a token and still knows it, although the token may be refused. If so, wait is 0 if a request
// with the token is allowed now, and otherwise how long to wait (docs/protocol.md, "Keep-alive").
func (t *Timers) Allow(h TokenHash) (known bool, wait time.Duration) { return t.allow(h, false) }

func (t *Timers) allow(h TokenHash, delayed bool) (known bool, wait time.Duration) {
	now := t.clock.now()
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.byTokenWithMu(h, delayed)
	if tm == nil {
		return false, 0
	}
	return true, (*Bucket)(&tm.Asked).Take(t.cfg.TokenLimit, now)
}

// Refresh restarts the timer of a token with its stored duration. When it returns nil, the new deadline is durable. The error is
// ErrNotFound if no such timer runs. After any other error the timer has either its old or its new deadline.
func (t *Timers) Refresh(ctx context.Context, h TokenHash) error {
	return t.KeepAlive(ctx, Kept{Hash: h})
}

// Restart gives the running timer of an event a new duration, counted from now: a state event was sent again with identical content
// (docs/protocol.md, "Sending"). The caller holds the lock of the event's state key.
func (t *Timers) Restart(ctx context.Context, eventID string, duration time.Duration) error {
	tm := t.ofEvent(eventID)
	if tm == nil {
		return ErrNotFound
	}
	row, _, err := t.load(ctx, tm)
	if err == nil {
		// The event is the current state, but a crash may have kept it from the clients. Confirm makes sure that they get it.
		err = t.confirm(ctx, tm, row.Event)
	}
	if err != nil {
		return fmt.Errorf("sending %s again: %w", eventID, err)
	}
	return t.refresh(ctx, tm, duration)
}

// refresh sets a new deadline, and a new duration if it is not 0.
func (t *Timers) refresh(ctx context.Context, tm *index.Timer, duration time.Duration) error {
	if t.isDoubtful(tm) {
		if err := t.dropReplaced(ctx, []*index.Timer{tm}); err != nil {
			return err
		}
	}
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	t.mu.Lock()
	running := tm.Running()
	if running && duration == 0 {
		duration = tm.Duration
	}
	t.mu.Unlock()
	if !running {
		return ErrNotFound
	}
	due := t.clock.now() + duration
	deadline := t.clock.stored(due)
	failpoint.Pass(failpoint.BeforeRefresh)
	ok, err := t.refreshes.Do(ctx, Refresh{NID: tm.NID(), Duration: duration, Deadline: deadline})
	if err != nil {
		if !errors.Is(err, batch.ErrNotAsked) {
			t.metrics.errors.WithLabelValues("refresh").Inc()
		}
		return fmt.Errorf("storing a new deadline: %w", err)
	}
	if !ok {
		if _, _, err = t.loadUnderRow(ctx, tm); err != nil {
			return err
		}
		return ErrNotFound
	}
	failpoint.Pass(failpoint.AfterRefresh)
	t.mu.Lock()
	tm.Duration, tm.Due, tm.Deadline = duration, due, deadline.UnixMilli()
	tm.Resolve(index.RowUnsure)
	tm.Failures = 0
	if tm.Presence == index.Unsent {
		tm.Presence = index.Unconfirmed
	}
	wake, scheduled := tm.Wake()
	nearer := scheduled && due < wake
	if nearer {
		t.index.Schedule(tm, due)
	}
	t.mu.Unlock()
	if nearer {
		t.notify()
	}
	return nil
}
