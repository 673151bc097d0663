package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestDrops(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		redacted, purged, left := w.message("!a", time.Hour), w.message("!b", time.Hour), w.message("!c", time.Hour)
		time.Sleep(time.Second)
		when := time.Now()
		time.Sleep(time.Second)
		back, kept := w.message("!c", time.Hour), w.message("!a", time.Hour)
		w.DropEvent(t.Context(), redacted.ID, Redacted)
		w.DropEvent(t.Context(), "$unknown", Redacted)
		w.DropRoom(t.Context(), "!b")
		w.DropSender(t.Context(), "!c", "@alice:example.org", when)
		w.DropSender(t.Context(), "!a", "@bob:example.org", time.Now())
		for _, e := range []Event{redacted, purged, left} {
			require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		}
		for _, e := range []Event{back, kept} {
			require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
			time.Sleep(time.Second)
		}
		require.Equal(t, 2, w.store.len())
		// A sender who left is told so once at /end, and then the token is unknown. The token of a redacted event is unknown at once.
		var dropped *DropError
		require.ErrorAs(t, w.End(t.Context(), w.hash(left)), &dropped)
		require.Equal(t, SenderGone, dropped.Reason)
		require.ErrorIs(t, w.End(t.Context(), w.hash(left)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), w.hash(redacted)), ErrNotFound)
		time.Sleep(2 * time.Hour)
		w.wantClosings(back, kept)
	})
}

// A claimed event is sent whatever the stream reports meanwhile, because it may be in the room already.
func TestDropSparesWhatIsClaimed(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.DropEvent(t.Context(), e.ID, Redacted)
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
	})
}

func TestTokensOfSendersWhoLeftAreForgotten(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		long, short := w.message("!a", time.Hour), w.message("!a", time.Minute)
		time.Sleep(time.Second)
		w.DropSender(t.Context(), "!a", "@alice:example.org", time.Now())
		time.Sleep(time.Minute)
		require.True(t, w.known(w.hash(long)))
		require.False(t, w.known(w.hash(short)), "not after its deadline")
		time.Sleep(refusedFor)
		require.False(t, w.known(w.hash(long)))
		require.True(t, w.index.Empty())
	})
}

// A token of a sender who has left is refused for as long as promised, even if the row cannot be deleted at first.
func TestRefusalOutlivesAFailedDelete(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.store.set(false, failing("drop"))
		w.DropSender(t.Context(), e.RoomID, e.Sender, time.Now().Add(time.Second))
		time.Sleep(time.Second)
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		require.NoError(t, w.invariants())
		var dropped *DropError
		require.ErrorAs(t, w.End(t.Context(), w.hash(e)), &dropped)
		require.Equal(t, SenderGone, dropped.Reason)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		require.True(t, w.index.Empty())
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.DropSender(t.Context(), e.RoomID, e.Sender, time.Now().Add(time.Second))
		time.Sleep(refusedFor + time.Second)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		require.True(t, w.index.Empty())
	})
}

func TestRoomOfADelayedEventIsPurged(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		gone, kept := w.schedule(leave("key"), "gone", 10*time.Second), w.schedule(later("!other"), "kept", 10*time.Second)
		w.DropRoom(t.Context(), "!room")
		require.JSONEq(t, `{"error":"the event is not sent: room_gone"}`, string(w.final(gone).Error))
		require.Nil(t, w.final(kept))
		time.Sleep(10 * time.Second)
		w.wantSent("kept")
	})
}

// A claimed event is sent whatever the stream reports meanwhile, because it may be in the room already.
func TestDropSparesDelayedEventsThatAreClaimed(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", 10*time.Second)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.set(leave("key"), bob)
		w.DropRoom(t.Context(), "!room")
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantSent("left")
		w.wantFinal(delayID, Final.Sent)
	})
}

// A delayed event survives that its sender leaves the room. It is refused, or not, when it is due.
func TestSenderOfADelayedEventLeaves(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", 10*time.Second)
		time.Sleep(time.Second)
		w.DropSender(t.Context(), "!room", alice, time.Now())
		time.Sleep(9 * time.Second)
		w.wantSent("left")
	})
}
