package expiration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
)

// cancelPatience is how long CancelAll waits, all in all, for events that are being sent.
const cancelPatience = 5 * time.Second

// CancelAll cancels the delayed events that a user has scheduled, in all rooms. It waits, within bounds, for those that are being
// sent: when it returns nil, they are in their rooms. The error says that some may still be scheduled; CancelAll may be called
// again. An event that a request schedules after it has looked is left alone, so the Roomserver must refuse to send it.
func (t *Timers) CancelAll(ctx context.Context, owner string) error {
	var timers []ref
	sender := t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.ofSender(sender, func(r ref, tm *timer) {
		if tm.delayed && !tm.gone {
			timers = append(timers, r)
		}
	})
	t.mu.Unlock()
	failed := t.cancelEach(ctx, timers)
	waiting, cancel := context.WithTimeout(ctx, cancelPatience)
	defer cancel()
	for _, r := range timers {
		t.awaitAttempt(waiting, r)
	}
	return failed
}

// CancelState cancels the delayed events that a user scheduled for a piece of state before a time. One that is being sent is left
// alone. If it fails, some may still be scheduled: call it again.
func (t *Timers) CancelState(ctx context.Context, s StateKey, owner string, before time.Time) error {
	var timers []ref
	state, sender := t.tokens.names.state(s), t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.ofState(state, func(r ref, tm *timer) {
		if tm.delayed && tm.running() && tm.sender == sender && time.UnixMilli(tm.received).Before(before) {
			timers = append(timers, r)
		}
	})
	t.mu.Unlock()
	return t.cancelEach(ctx, timers)
}

// cancelEach finalises delayed events as cancelled, unless they are being sent.
func (t *Timers) cancelEach(ctx context.Context, timers []ref) error {
	var failed []error
	ctx, cancel := context.WithTimeout(ctx, batch.Timeout)
	defer cancel()
	for _, r := range timers {
		if err := t.finalise(ctx, r, Final{}, true); err != nil && !errors.Is(err, ErrNotFound) {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("cancelling delayed events, %d of %d: %w", len(failed), len(timers), errors.Join(failed...))
	}
	return nil
}

// awaitAttempt waits for the attempt to send an event that is claimed, if one is under way.
func (t *Timers) awaitAttempt(ctx context.Context, r ref) {
	t.mu.Lock()
	tm := t.index.at(r)
	claimed := tm != nil && !tm.gone && tm.claimed
	t.mu.Unlock()
	if !claimed {
		return
	}
	if unlock, err := t.closings.Lock(ctx, r.nid); err == nil {
		unlock()
	}
}
