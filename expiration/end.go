package expiration

import (
	"context"
	"errors"
	"fmt"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// End closes the event of a token now. When it returns nil, the closing event is in the room. The error is ErrNotFound if no such timer
// runs, a *DropError if the sender may not send the closing event, and otherwise a passing fault. After a passing fault the timer goes on,
// and End may be called again.
func (t *Timers) End(ctx context.Context, h TokenHash) error {
	tm := t.find(h, false)
	switch {
	case tm == nil:
		return ErrNotFound
	case t.takeRefusal(tm):
		return &DropError{Reason: SenderGone}
	}
	err := t.endNow(ctx, tm)
	var dropped *DropError
	switch {
	case err == nil:
		return nil
	case t.takeRefusal(tm): // the output stream was faster
		return &DropError{Reason: SenderGone}
	case errors.As(err, &dropped):
		if reasons[dropped.Reason].refusal {
			return err
		}
		return ErrNotFound
	case errors.Is(err, ErrNotFound):
		return ErrNotFound
	}
	return fmt.Errorf("ending an expiring event: %w", err)
}

// takeRefusal reports whether a timer was dropped because its sender is gone and no caller was told yet. If so, it forgets the token, so
// that the refusal is answered once (docs/protocol.md, "Keep-alive").
func (t *Timers) takeRefusal(tm *index.Timer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.ForgetToken(tm)
}

// endNow makes an attempt whose caller waits for the answer. The caller can give up while it waits for the locks. Once the attempt has
// begun, it is completed regardless.
func (t *Timers) endNow(ctx context.Context, tm *index.Timer) error {
	waiting, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	unlock, err := t.lockTimer(waiting, tm)
	if err != nil {
		return err
	}
	defer unlock()
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), requestTimeout)
	defer cancel()
	defer t.removeRow(ctx, tm)
	for {
		// An unsendable closing event is attempted again at once, so that the caller need not come back: after maxUnsendable attempts the
		// error is final. There are two exceptions: a panic, because its cause may lie elsewhere in the server, and a delayed event, because
		// it stays scheduled.
		if err := t.attempt(ctx, tm, Ended, nil); !isUnsendable(err) || errors.As(err, new(*panicError)) || tm.Delayed() {
			return err
		}
	}
}
