package expiration

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// The wall clock may step: while the process lives, only elapsed time counts.
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
