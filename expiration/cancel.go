package expiration

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// cancelPatience is how long CancelAll waits, in total, for events that are being sent.
const cancelPatience = 5 * time.Second

// cancel cancels a scheduled event. The caller can give up until the write begins, and not after that.
func (t *Timers) cancel(ctx context.Context, tm *index.Timer) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	return t.finaliseUnderRow(ctx, tm, Final{}, true)
}

// CancelAll cancels the delayed events that a user has scheduled, in all rooms, and deletes what is stored of the user's finalised ones. An
// event that is claimed cannot be cancelled. CancelAll waits, up to cancelPatience, for the attempts to send such events that are under
// way; an event whose attempt fails or takes longer comes into its room later, or is given up.
//
// After an error some events may still be scheduled, and CancelAll may be called again. An event that is scheduled after CancelAll has
// collected the timers is not cancelled, so the Roomserver must refuse to send it.
func (t *Timers) CancelAll(ctx context.Context, owner string) error {
	var timers []*index.Timer
	sender := t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.DelayedOf(sender, func(tm *index.Timer) { timers = append(timers, tm) })
	t.mu.Unlock()
	failed := t.cancelEach(ctx, timers)
	waiting, cancel := context.WithTimeout(ctx, cancelPatience)
	defer cancel()
	for _, tm := range timers {
		t.awaitAttempt(waiting, tm)
	}
	return errors.Join(failed, t.erase(ctx, owner))
}

// erase deletes a user's finalised events, with their content. Nobody can look them up when the account is deactivated.
func (t *Timers) erase(ctx context.Context, owner string) error {
	ctx, cancel := context.WithTimeout(ctx, batch.Timeout)
	defer cancel()
	if err := t.store.Erase(ctx, owner); err != nil {
		return fmt.Errorf("deleting finalised events: %w", err)
	}
	return nil
}

// CancelState cancels the delayed events that a user scheduled for a piece of state before a time. It does not touch one that is being
// sent. After an error some may still be scheduled, and CancelState may be called again.
func (t *Timers) CancelState(ctx context.Context, s StateKey, owner string, before time.Time) error {
	var timers []*index.Timer
	state, sender := t.tokens.names.state(s), t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.OfState(state, func(tm *index.Timer) {
		if tm.Delayed() && tm.Running() && tm.Sender() == sender && tm.Received().Before(before) {
			timers = append(timers, tm)
		}
	})
	t.mu.Unlock()
	return t.cancelEach(ctx, timers)
}

// cancelEach finalises delayed events as cancelled, unless they are being sent.
func (t *Timers) cancelEach(ctx context.Context, timers []*index.Timer) error {
	var failed []error
	ctx, cancel := context.WithTimeout(ctx, batch.Timeout)
	defer cancel()
	for _, tm := range timers {
		if err := t.finalise(ctx, tm, Final{}, true); err != nil && !errors.Is(err, ErrNotFound) {
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return fmt.Errorf("cancelling delayed events, %d of %d: %w", len(failed), len(timers), errors.Join(failed...))
	}
	return nil
}

// awaitAttempt waits for the attempt to send an event that is claimed, if one is under way, or until ctx is done.
func (t *Timers) awaitAttempt(ctx context.Context, tm *index.Timer) {
	t.mu.Lock()
	claimed := tm.Phase() == index.Claimed
	t.mu.Unlock()
	if !claimed {
		return
	}
	if unlock, err := t.lockTimer(ctx, tm); err == nil {
		unlock()
	}
}
