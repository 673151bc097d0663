package expiration

import (
	"context"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// DropEvent stops the timer of an event, if it has one that runs. No closing event will be sent.
func (t *Timers) DropEvent(ctx context.Context, eventID string, reason DropReason) {
	r := t.ofEvent(eventID)
	if r == (ref{}) {
		return
	}
	if reason == Redacted { // who repeats its request is told of it, and does not send it anew
		t.mu.Lock()
		t.index.answer(r, eventID)
		t.mu.Unlock()
	}
	t.drop(ctx, r, reason)
}

// DropSender stops the timers of a user in a room whose events were accepted before the given time.
func (t *Timers) DropSender(ctx context.Context, roomID, userID string, before time.Time) {
	var timers []ref
	room, sender := t.tokens.names.hash(roomID), t.tokens.names.hash(userID)
	t.mu.Lock()
	t.index.ofSender(sender, func(r ref, tm *timer) {
		if !tm.delayed && tm.room == room && time.UnixMilli(tm.received).Before(before) {
			timers = append(timers, r)
		}
	})
	t.mu.Unlock()
	for _, r := range timers {
		t.drop(ctx, r, SenderGone)
	}
}

// DropRoom stops all timers of a room.
func (t *Timers) DropRoom(ctx context.Context, roomID string) {
	for _, r := range t.timersIn(roomID) {
		t.drop(ctx, r, RoomGone)
	}
}

// drop stops a running timer. One that is claimed is left to whoever closes it.
func (t *Timers) drop(ctx context.Context, r ref, reason DropReason) {
	if t.isDelayed(r) {
		t.dropDelayed(ctx, r, reason)
		return
	}
	unlock, err := t.lockRow(ctx, r)
	if err != nil { // whoever asked for it asks again, or it is found out when the timer is due; see Settle
		t.log.WithError(err).WithFields(logrus.Fields{"timer_nid": r.nid, "reason": reason}).Warn("Failed to drop a timer")
		return
	}
	t.mu.Lock()
	tm := t.index.at(r)
	running := tm.running()
	if running {
		t.index.remove(r)
		if now := t.clock.now(); reason == SenderGone && tm.due > now {
			t.index.refuse(r, min(tm.due, now+refusedFor))
		}
	}
	t.mu.Unlock()
	unlock()
	if !running {
		return
	}
	t.metrics.drops.WithLabelValues(string(reason)).Inc()
	t.log.WithFields(logrus.Fields{"timer_nid": r.nid, "reason": reason}).Debug("Dropped the timer of an expiring event")
	failpoint.Pass(failpoint.BeforeDrop)
	t.removeRow(ctx, r)
}

func (t *Timers) timersIn(roomID string) []ref {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.inRoom(room)
}
