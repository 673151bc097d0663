package expiration

import (
	"context"
	"errors"
	"fmt"
)

// End closes the event of a token now. When it returns nil, the closing event is in the room. The error is ErrNotFound
// if no such timer runs, a *DropError if the sender may not send the closing event, and else a passing fault: the timer
// goes on, and End may be called again.
func (t *Timers) End(ctx context.Context, h TokenHash) error {
	r := t.find(h, false)
	switch {
	case r == ref{}:
		return ErrNotFound
	case t.refusedOnce(r):
		return &DropError{Reason: SenderGone}
	}
	err := t.endNow(ctx, r)
	var dropped *DropError
	switch {
	case err == nil:
		return nil
	case t.refusedOnce(r): // the stream was faster
		return &DropError{Reason: SenderGone}
	case errors.As(err, &dropped):
		if dropped.isRefusal() {
			return err
		}
		return ErrNotFound
	case errors.Is(err, ErrNotFound):
		return ErrNotFound
	}
	return fmt.Errorf("ending an expiring event: %w", err)
}

// refusedOnce reports whether a timer was dropped because its sender is gone and nobody was told, and forgets its token.
func (t *Timers) refusedOnce(r ref) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.at(r)
	if tm == nil || !tm.refused {
		return false
	}
	t.index.forgetToken(r)
	return true
}

// endNow makes an attempt whose caller waits for the answer. The caller can hang up until it is the timer's turn; what has begun
// then is brought to its end.
func (t *Timers) endNow(ctx context.Context, r ref) error {
	waiting, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	unlock, err := t.lockTimer(waiting, r)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	defer t.removeRow(ctx, r)
	for {
		// Whoever waits for the answer need not come again for an event that cannot be sent: soon the error is another one. A panic
		// may have come from elsewhere, and is a fault of the server's at first.
		if err := t.attempt(ctx, r, Ended, nil); !isUnsendable(err) || errors.As(err, new(*panicError)) {
			return err
		}
	}
}
