package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// The owner can see the delay ID as soon as anybody can see the event, and in every later process.
func TestDelayIDsOfSentEvents(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		const eventID = "$delayed1"
		check := func(want bool) {
			t.Helper()
			require.Equal(t, want, w.AnySent())
			require.Equal(t, want, w.HasSent(alice))
			require.False(t, w.HasSent(bob))
			got, err := w.DelayIDs(t.Context(), alice, []string{"$x", eventID})
			require.NoError(t, err)
			if want {
				require.Equal(t, map[string]string{eventID: delayID}, got)
			} else {
				require.Empty(t, got)
			}
			got, err = w.DelayIDs(t.Context(), bob, []string{eventID})
			require.NoError(t, err)
			require.Empty(t, got)
		}
		check(false)
		w.roomserver.set(hooks{afterClaim: func(Event) error { check(true); return errFault }})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		check(true)
		require.Nil(t, w.final(delayID), "being sent")
		require.Len(t, w.list(alice, ""), 1)
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Sent)
		w.loaded = func() { w.store.set(false, failing("read")) }
		w.restart(time.Second)
		w.loaded = nil
		check(true)
		w.roomserver.set(hooks{})
		w.store.set(false, failing("finalise"))
		time.Sleep(time.Minute)
		w.wantSent("left")
		check(true)
		require.Nil(t, w.final(delayID), "in the room, and that is not stored yet")
		wantFinalised(t, w.RestartDelayed(t.Context(), delayID, alice), Final.Sent)
		w.restart(time.Second)
		check(true)
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		check(true)
		require.Empty(t, w.inFlight)
		w.restart(time.Second)
		check(true)
	})
	// A claim that was written although it failed is found at the next attempt.
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", 10*time.Second)
		w.store.set(true, failing("claim"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.store.set(false, nil)
		require.False(t, w.AnySent())
		w.roomserver.set(hooks{afterClaim: func(Event) error {
			require.True(t, w.HasSent(alice))
			return nil
		}})
		time.Sleep(firstPause)
		w.wantSent("left")
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		require.NoError(t, w.CancelDelayed(t.Context(), w.schedule(leave("key"), "left", time.Hour), alice))
		w.restart(0)
		require.False(t, w.AnySent(), "cancelled")
		require.False(t, w.HasSent(alice))
	})
}
