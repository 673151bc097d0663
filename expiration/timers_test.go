package expiration

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	logrus.SetLevel(logrus.PanicLevel) // the tests cause faults on purpose
	goleak.VerifyTestMain(m)           // Stop ends all goroutines
}

func TestStopIsPatientAndRepeatable(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + time.Millisecond)
		w.Stop()
		w.wantClosings(e)
		w.Stop()
	})
	New(Config{}, newMemoryStore(), newFakeRoomserver(), &Tokens{}).Stop() // never started
}

// Whenever and however often a process is stopped, the next one finishes the rest, and nothing is closed twice. Stop is called by several
// goroutines while closing events are built, claimed and sent.
func TestStopAtAnyMoment(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(7 * time.Millisecond), afterClaim: takes(11 * time.Millisecond)})
		const events = 40
		closed := map[string]bool{}
		for i := range events {
			w.message(fmt.Sprintf("!room%d", i%5), time.Duration(i+1)*3*time.Millisecond)
		}
		for life := range 2 * events {
			time.Sleep(time.Duration(life) * time.Millisecond)
			var stops sync.WaitGroup
			for range 3 {
				stops.Go(w.Stop)
			}
			stops.Wait()
			w.Stop()
			closings := len(w.roomserver.closings())
			time.Sleep(time.Second)
			require.Len(t, w.roomserver.closings(), closings, "the engine went on after Stop")
			w.start(w.cfg)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		for _, c := range w.roomserver.closings() {
			require.False(t, closed[c.closes], "closed twice")
			closed[c.closes] = true
		}
		require.Len(t, closed, events)
		require.Zero(t, w.store.len())
	})
	unstarted := New(Config{}, newMemoryStore(), newFakeRoomserver(), &Tokens{})
	unstarted.Stop()
	require.NoError(t, unstarted.Start(t.Context()))
	unstarted.Stop()
	unstarted.Stop()
}

func TestStartFailsWithTheDatabase(t *testing.T) {
	store := newMemoryStore()
	store.set(false, func(string) error { return errFault })
	require.ErrorIs(t, New(Config{}, store, newFakeRoomserver(), &Tokens{}).Start(t.Context()), errFault)
}
