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

// errLeftOver: a request that is repeated has left a row behind that cannot be deleted just now.
var errLeftOver = errors.New("the request failed before, and what it left cannot be deleted")

// Schedule stores an event that is to be sent after a delay, which must be positive, and returns its delay ID. A request that
// is repeated gets the one that it was given first, whatever has become of it since. The error is a *LimitError if the user,
// unless exempt, has as many events scheduled as are allowed.
func (t *Timers) Schedule(ctx context.Context, e Event, d Delayed, delay time.Duration, exempt bool) (delayID string, err error) {
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
	if s, ok := e.State(); ok {
		// What comes after this is seen to be newer than what the event was scheduled over.
		unlock, err := t.LockState(ctx, s)
		if err != nil {
			return "", err
		}
		defer unlock()
		if d.Over, err = t.roomserver.CurrentState(ctx, s); err != nil {
			return "", err
		}
	}
	d.Exempt = exempt
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	e.ID = base64.RawURLEncoding.EncodeToString(id[:])
	tm, _, err := t.insert(ctx, Timer{Event: e, Delayed: &d, Duration: delay}, exempt)
	if err != nil {
		return "", err
	}
	t.mu.Lock()
	t.activateWithMu(tm) // unless somebody who had found it has sent or finalised it
	t.mu.Unlock()
	return t.tokens.Token(e.ID), nil
}

// Scheduled returns the delay ID that a request was given which is repeated now, or "". If the first is being dealt with, it is
// waited for: its row may be there, and yet be taken back.
func (t *Timers) Scheduled(ctx context.Context, request RequestHash) (delayID string, err error) {
	unlock, err := t.LockRequest(ctx, request)
	if err != nil {
		return "", err
	}
	defer unlock()
	return t.scheduledUnderRequest(ctx, request)
}

// scheduled is Scheduled under the request's lock.
func (t *Timers) scheduledUnderRequest(ctx context.Context, request RequestHash) (delayID string, err error) {
	for sure := false; ; sure = true {
		rowID, err := t.store.Requested(ctx, request)
		switch {
		case errors.Is(err, ErrNotFound):
			return "", nil
		case err != nil:
			return "", fmt.Errorf("looking for a request: %w", err)
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
		// It was finalised; or it was left over and is deleted since it was looked for, then it is not found again.
	}
}

// leftOver returns the timer of a delayed event that was written although writing it failed, and is not yet deleted again.
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
