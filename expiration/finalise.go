package expiration

import (
	"context"
	"fmt"
	"maps"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// finalise writes the result of a delayed event, and ends its timer when that is written. If running is set, a claimed event is left alone,
// and the error is ErrNotFound. After any other error the timer stays, and its next attempt reads the row.
func (t *Timers) finalise(ctx context.Context, tm *index.Timer, f Final, running bool) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	return t.finaliseUnderRow(ctx, tm, f, running)
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
		t.senders[tm.Sender()] = t.round
	}
	t.forgetInFlightWithMu(tm)
	t.index.Stop(tm)
	t.index.Forget(tm)
	return nil
}

// forgetInFlightWithMu undoes noteInFlight when a delayed event is finalised.
func (t *Timers) forgetInFlightWithMu(tm *index.Timer) {
	maps.DeleteFunc(t.inFlight, func(_ string, sent inFlight) bool { return sent.timer == tm })
}

// finaliseSent finalises a delayed event that is in its room.
func (t *Timers) finaliseSent(ctx context.Context, tm *index.Timer, row Timer) error {
	existed := row.Claim.Event.PDU == nil
	err := t.finalise(ctx, tm, Final{EventID: row.Claim.Event.EventID, Existed: existed}, false)
	if err != nil {
		if existed { // the row knows nothing of the claim, and the next attempt must not either
			t.mu.Lock()
			t.index.Unclaim(tm)
			t.mu.Unlock()
		}
		t.retryLater(tm, row.Event, err)
		return err
	}
	t.log.WithFields(logrus.Fields{
		"event_id": row.Claim.Event.EventID, "room_id": row.Event.RoomID, "outcome": row.Claim.Outcome,
	}).Info("Sent a delayed event")
	return nil
}

// dropDelayed finalises a scheduled event that will not be sent. If that fails, the attempt at the deadline tries again.
func (t *Timers) dropDelayed(ctx context.Context, tm *index.Timer, reason DropReason) {
	if err := t.finalise(ctx, tm, t.finalOf(&DropError{Reason: reason}), true); err != nil && !isFinal(err) {
		t.log.WithError(err).WithField("timer_nid", tm.NID()).Error("Failed to cancel a delayed event")
	}
}

// result is the event's label in the metrics.
func (f Final) result() string {
	switch {
	case f.Sent():
		return "sent"
	case f.Cancelled():
		return "cancelled"
	}
	return "error"
}

// finalOf returns the result of a delayed event that will never be sent.
func (t *Timers) finalOf(dropped *DropError) (f Final) {
	if !reasons[dropped.Reason].cancels {
		f.Error = t.cfg.Explain(dropped)
	}
	return f
}
