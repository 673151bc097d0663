package expiration

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A client that repeats a message after a crash gets the same event, whatever has become of it.
func TestRepeatedRequest(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		begin := func(n byte) Event {
			e := Event{ID: fmt.Sprintf("$event%d", n), RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
			sent := e
			sent.Request = &Request{Hash: RequestHash{n}, Signed: SignedEvent{EventID: e.ID, PDU: []byte(e.ID)}}
			_, err := w.Begin(t.Context(), sent, time.Minute, false)
			require.NoError(t, err)
			return e
		}
		queued, stored, sent := begin(1), begin(2), begin(3)
		w.roomserver.store(stored)
		w.roomserver.send(sent)
		w.restart(time.Second)
		for n, e := range map[byte]Event{1: queued, 2: stored, 3: sent} {
			for range 2 {
				eventID, err := w.Sent(t.Context(), RequestHash{n})
				require.NoError(t, err)
				require.Equal(t, e.ID, eventID)
				require.True(t, w.roomserver.has(e.ID), "the request was answered, and the event is not in its room")
			}
		}
		eventID, err := w.Sent(t.Context(), RequestHash{4})
		require.NoError(t, err)
		require.Empty(t, eventID)

		// The request is remembered, whether the event is closed or not, until clients no longer repeat it.
		require.NoError(t, w.End(t.Context(), w.hash(sent)))
		eventID, err = w.Sent(t.Context(), RequestHash{3})
		require.NoError(t, err)
		require.Equal(t, sent.ID, eventID)
		time.Sleep(3 * retriedFor)
		w.mu.Lock()
		defer w.mu.Unlock()
		tm, eventID := w.index.OfRequest(w.tokens.names.request(RequestHash{3}))
		require.Nil(t, tm)
		require.Empty(t, eventID)
	})
}

// A repeated request that sends an event again, and an attempt that finds the event missing, do not overlap.
func TestSentWaitsForAnAttempt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := requested(Event{ID: "$lost", RoomID: "!room", Type: "m.room.message", Sender: alice}, 1)
		e.Request.Signed = SignedEvent{EventID: e.ID, PDU: []byte("{}")}
		p, err := w.Begin(t.Context(), e, 10*time.Second, false)
		require.NoError(t, err)
		p.Activate(false)
		w.roomserver.set(hooks{wake: takes(5 * time.Second)}) // so the attempt is still in progress
		time.Sleep(11 * time.Second)
		begun := time.Now()
		eventID, err := w.Sent(t.Context(), RequestHash{1})
		require.NoError(t, err)
		require.Equal(t, e.ID, eventID)
		require.NotZero(t, time.Since(begun), "it waited")
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
	})
}
