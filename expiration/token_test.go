package expiration

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestTokens(t *testing.T) {
	a, err := NewTokens([]byte("a"))
	require.NoError(t, err)
	again, err := NewTokens([]byte("a"))
	require.NoError(t, err)
	b, err := NewTokens([]byte("b"))
	require.NoError(t, err)
	require.Len(t, a.Token("$x"), 43)
	require.Equal(t, a.Token("$x"), again.Token("$x"))
	require.NotEqual(t, a.Token("$x"), a.Token("$y"))
	require.NotEqual(t, a.Token("$x"), b.Token("$x"))
	require.NotEqual(t, HashToken("x"), HashToken("y"))
}

// Tokens and delay IDs are separate: neither works in place of the other.
func TestDelayIDsAreNoTokens(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		delayID, token := w.schedule(leave("key"), "left", time.Hour), w.Token(e.ID)
		require.False(t, w.known(HashToken(delayID)))
		require.ErrorIs(t, w.Refresh(t.Context(), HashToken(delayID)), ErrNotFound)
		require.ErrorIs(t, w.End(t.Context(), HashToken(delayID)), ErrNotFound)
		require.False(t, w.knownDelayed(token))
		for _, act := range []func(context.Context, string, string) error{w.RestartDelayed, w.SendDelayed, w.CancelDelayed} {
			for _, owner := range []string{"", alice} {
				require.ErrorIs(t, act(t.Context(), token, owner), ErrNotFound)
			}
		}
		_, err := w.DelayedEvent(t.Context(), token, alice)
		require.ErrorIs(t, err, ErrNotFound)
		require.True(t, w.known(w.hash(e)))
		require.True(t, w.knownDelayed(delayID))
		w.wantSent()
		w.wantClosings()
	})
}
