package expiration

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestEndClosesOnce(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		errs := make(chan error, 5)
		for range 5 {
			go func() { errs <- w.End(t.Context(), w.hash(e)) }()
		}
		time.Sleep(time.Minute)
		won := 0
		for range 5 {
			if err := <-errs; err == nil {
				won++
			} else {
				require.ErrorIs(t, err, ErrNotFound)
			}
		}
		require.Equal(t, 1, won)
		w.wantClosings(e)
	})
}

func TestEndSurvivesACallerWhoHangsUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		ctx, cancel := context.WithCancel(t.Context())
		go func() { _ = w.End(ctx, w.hash(e)) }()
		synctest.Wait()
		cancel()
		time.Sleep(2 * time.Second)
		w.wantClosings(e)
	})
}

// The stream reports that the sender has left while the closing event is being built: a caller of End is told so, once.
func TestSenderLeavesDuringEnd(t *testing.T) {
	for _, failed := range []error{&DropError{Reason: SenderGone}, errFault} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			e := w.message("!a", time.Hour)
			time.Sleep(time.Second)
			w.roomserver.set(hooks{beforeClaim: func(Event) error {
				w.DropSender(t.Context(), "!a", "@alice:example.org", time.Now())
				return failed
			}})
			var dropped *DropError
			require.ErrorAs(t, w.End(t.Context(), w.hash(e)), &dropped)
			require.Equal(t, SenderGone, dropped.Reason)
			require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
			require.True(t, w.index.Empty())
		})
	}
}
