package expiration

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// DropEvent stops the timer of an event if it is running. No closing event is sent.
func (t *Timers) DropEvent(ctx context.Context, eventID string, reason DropReason) {
	tm := t.ofEvent(eventID)
	if tm == nil {
		return
	}
	if reason == Redacted { // a repeated request gets this event and sends no new one
		t.mu.Lock()
		t.index.RememberRequest(tm, eventID)
		t.mu.Unlock()
	}
	t.drop(ctx, tm, reason)
}

// DropSender stops the timers of a user in a room whose events were accepted before the given time.
func (t *Timers) DropSender(ctx context.Context, roomID, userID string, before time.Time) {
	var timers []*index.Timer
	room, sender := t.tokens.names.hash(roomID), t.tokens.names.hash(userID)
	t.mu.Lock()
	t.index.OfSender(sender, index.Expiring, func(tm *index.Timer) {
		if tm.Room() == room && tm.Received().Before(before) {
			timers = append(timers, tm)
		}
	})
	t.mu.Unlock()
	for _, tm := range timers {
		t.drop(ctx, tm, SenderGone)
	}
}

// DropRoom stops all timers in a room.
func (t *Timers) DropRoom(ctx context.Context, roomID string) {
	for _, tm := range t.timersIn(roomID) {
		t.drop(ctx, tm, RoomGone)
	}
}

// drop stops a running timer. A claimed timer is left to the attempt that claimed it.
func (t *Timers) drop(ctx context.Context, tm *index.Timer, reason DropReason) {
	if tm.Delayed() {
		t.dropDelayed(ctx, tm, reason)
		return
	}
	unlock, err := t.lockRow(ctx, tm)
	if err != nil { // the caller asks again, or the attempt at the deadline finds out; see DeleteStopped
		t.log.WithError(err).WithFields(logrus.Fields{"timer_nid": tm.NID(), "reason": reason}).Warn("Failed to drop a timer")
		return
	}
	t.mu.Lock()
	running := tm.Running()
	if running {
		t.index.Stop(tm)
		if now := t.clock.now(); reason == SenderGone && tm.Due > now {
			t.index.Refuse(tm, min(tm.Due, now+refusedFor))
		}
	}
	t.mu.Unlock()
	unlock()
	if !running {
		return
	}
	t.metrics.drops.WithLabelValues(string(reason)).Inc()
	t.log.WithFields(logrus.Fields{"timer_nid": tm.NID(), "reason": reason}).Debug("Dropped the timer of an expiring event")
	failpoint.Pass(failpoint.BeforeDrop)
	t.removeRow(ctx, tm)
}

func (t *Timers) timersIn(roomID string) []*index.Timer {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.InRoom(room)
}
