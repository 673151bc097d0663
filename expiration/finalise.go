package expiration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// finalised replaces ErrNotFound by what has become of the event, if it was ever there.
func (t *Timers) orFinalised(ctx context.Context, delayID, owner string, err error) error {
	var dropped *DropError
	if !errors.Is(err, ErrNotFound) && !errors.As(err, &dropped) || dropped.isRefusal() {
		return err
	}
	d, err := t.DelayedEvent(ctx, delayID, owner)
	switch {
	case err != nil:
		return err
	case d.Final == nil:
		return ErrNotFound
	}
	return &FinalisedError{*d.Final}
}

// finalise writes what became of a delayed event, and takes its timer out when that is written; if running is set, only if it
// is still scheduled, and else the error is ErrNotFound. After another error the timer stays, and what is written is found out
// when it is looked at next.
func (t *Timers) finalise(ctx context.Context, tm *index.Timer, f Final, running bool) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	return t.finaliseUnderRow(ctx, tm, f, running)
}

// cancel takes a scheduled event back for a caller who can hang up until writing begins, and not after that.
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

// finaliseUnderRow is finalise under the row's lock.
func (t *Timers) finaliseUnderRow(ctx context.Context, tm *index.Timer, f Final, running bool) error {
	t.mu.Lock()
	if !tm.Live() || running && !tm.Running() {
		t.mu.Unlock()
		return ErrNotFound
	}
	t.mu.Unlock()
	f.At = t.clock.stored(t.clock.now())
	done, err := t.store.Finalise(ctx, tm.NID(), f, running, t.cfg.MaxFinalisedPerUser)
	failpoint.Pass(failpoint.AfterDelete)
	if err == nil && !done {
		if _, _, err = t.loadUnderRow(ctx, tm); err == nil {
			err = ErrNotFound
		}
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		tm.Doubt(index.RowUnsure)
		t.metrics.errors.WithLabelValues("finalise").Inc()
		return fmt.Errorf("finalising a delayed event: %w", err)
	}
	t.metrics.finalised.WithLabelValues(f.result()).Inc()
	if f.Sent() {
		t.senders[tm.Sender()] = struct{}{}
	}
	t.forgetInFlightWithMu(tm)
	t.index.Stop(tm)
	t.index.Forget(tm)
	return nil
}

// forgetInFlightWithMu is called when a delayed event is finalised. Timers.mu is held.
func (t *Timers) forgetInFlightWithMu(tm *index.Timer) {
	maps.DeleteFunc(t.inFlight, func(_ string, sent inFlight) bool { return sent.timer == tm })
}

// sent is what remains to be done for a delayed event that is in its room.
func (t *Timers) finaliseSent(ctx context.Context, tm *index.Timer, row Timer) error {
	err := t.finalise(ctx, tm, Final{EventID: row.Claim.Event.EventID}, false)
	if err != nil {
		t.retryLater(tm, row.Event, err)
		return err
	}
	t.log.WithFields(logrus.Fields{
		"event_id": row.Claim.Event.EventID, "room_id": row.Event.RoomID, "outcome": row.Claim.Outcome,
	}).Info("Sent a delayed event")
	return nil
}

// dropDelayed finalises a scheduled event that will not be sent. If that fails, it is seen again when it is due.
func (t *Timers) dropDelayed(ctx context.Context, tm *index.Timer, reason DropReason) {
	if err := t.finalise(ctx, tm, t.finalOf(&DropError{Reason: reason}), true); err != nil && !isFinal(err) {
		t.log.WithError(err).WithField("timer_nid", tm.NID()).Error("Failed to cancel a delayed event")
	}
}

// result is what the metrics call it.
func (f Final) result() string {
	switch {
	case f.Sent():
		return "sent"
	case f.Cancelled():
		return "cancelled"
	}
	return "error"
}

// finalOf returns what becomes of a delayed event that will never be sent.
func (t *Timers) finalOf(dropped *DropError) (f Final) {
	if dropped.Reason == Replaced || dropped.Reason == Deactivated { // which cancels it
		return f
	}
	f.Error = t.cfg.Explain(dropped)
	return f
}

// pruneInterval is how often finalised events are forgotten that have been kept for long enough.
const pruneInterval = time.Hour

// prune forgets finalised events that were kept for long enough, from time to time.
func (t *Timers) prune() {
	ticker := time.NewTicker(pruneInterval)
	defer ticker.Stop()
	for {
		err := t.store.Prune(t.ctx, t.clock.stored(t.clock.now()).Add(-t.cfg.KeepFinalised))
		if err != nil && t.ctx.Err() == nil {
			t.metrics.errors.WithLabelValues("prune").Inc()
			t.log.WithError(err).Error("Failed to forget finalised events")
		}
		select {
		case <-t.ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
