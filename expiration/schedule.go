package expiration

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// errLeftOver: the first attempt of a repeated request failed, and its row cannot be deleted at the moment.
var errLeftOver = errors.New("the request failed before, and its row cannot be deleted yet")

// Schedule stores an event that is sent after a delay, which must be positive, and returns its delay ID. A repeated request gets the first
// one's delay ID, whatever has become of that event. The error is a *LimitError if the user has reached the limit of scheduled events.
// What an application service schedules for the user counts apart, and has a limit of its own.
func (t *Timers) Schedule(ctx context.Context, e Event, d Delayed, delay time.Duration, service bool) (delayID string, err error) {
	if e.Request != nil {
		unlock, err := t.LockRequest(ctx, e.Request.Hash)
		if err != nil {
			return "", err
		}
		defer unlock()
		if delayID, err = t.scheduledUnderRequest(ctx, e.Request.Hash); err != nil || delayID != "" {
			return delayID, err
		}
	}
	d.Service = service
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	e.ID = base64.RawURLEncoding.EncodeToString(id[:])
	tm, _, err := t.insert(ctx, Timer{Event: e, Delayed: &d, Duration: delay}, service)
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	t.activateWithMu(tm) // has no effect if another request has sent or finalised it already
	t.mu.Unlock()
	return t.tokens.Token(e.ID), nil
}

// Scheduled returns the delay ID that an earlier, identical request got, or "". It waits for a request that is in progress, because the row
// of that request may still be removed.
func (t *Timers) Scheduled(ctx context.Context, request RequestHash) (delayID string, err error) {
	unlock, err := t.LockRequest(ctx, request)
	if err != nil {
		return "", err
	}
	defer unlock()
	return t.scheduledUnderRequest(ctx, request)
}

// scheduledUnderRequest is Scheduled under the request's lock.
func (t *Timers) scheduledUnderRequest(ctx context.Context, request RequestHash) (delayID string, err error) {
	for sure := false; ; sure = true {
		rowID, err := t.store.Requested(ctx, request)
		switch {
		case errors.Is(err, ErrNotFound):
			return "", nil
		case err != nil:
			return "", fmt.Errorf("looking up a request: %w", err)
		}
		delayID = t.tokens.Token(rowID)
		h := HashToken(delayID)
		switch tm := t.leftOver(h); {
		case tm != nil:
			t.removeRow(ctx, tm)
			if t.leftOver(h) != nil {
				return "", errLeftOver
			}
			return "", nil
		case sure || t.find(h, true) != nil:
			return delayID, nil
		}
		// The row has no timer in memory: the event was finalised, or a leftover row was deleted since Requested. Requested tells which.
	}
}

// leftOver returns the timer of a delayed event whose Insert failed but wrote the row, if the row is not deleted yet.
func (t *Timers) leftOver(h TokenHash) *index.Timer {
	t.mu.Lock()
	defer t.mu.Unlock()
	for tm := range t.index.Left() {
		if tm.Token() == tokenOf(h) {
			return tm
		}
	}
	return nil
}
