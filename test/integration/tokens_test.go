package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// Tokens are opaque, and are neither stored nor logged.

func testTokens(t *testing.T, alice *user, roomID string) {
	seen := map[string]bool{}
	for range 10 {
		sent := alice.sendMessage(t, roomID, 600)
		require.Regexp(t, regexp.MustCompile(`^[A-Za-z0-9_-]{43,}$`), sent.token)
		require.False(t, seen[sent.token])
		seen[sent.token] = true
		for _, part := range []string{roomID, alice.UserID, sent.eventID} {
			require.NotContains(t, sent.token, strings.Trim(part, "!@$"))
		}
	}
}

// The server stores only the hash of a token. The cleanup of start searches the same places for the token itself.
func TestHashAtRest(t *testing.T) {
	t.Parallel()
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			dsn := db.open(t)
			s := start(t, homeserver.Config{Postgres: dsn})
			alice := s.newUser(t)
			sent := alice.sendMessage(t, s.room(t, alice), 600)
			hash := sha256.Sum256([]byte(sent.token))
			require.NoError(t, s.Stop())
			found := 0
			for _, data := range s.data(t, dsn) {
				if bytes.Contains(data, hash[:]) || bytes.Contains(data, []byte(hex.EncodeToString(hash[:]))) {
					found++
				}
			}
			require.Equal(t, 1, found, "the hash is in the table of the timers alone")
		})
	}
}

// With all logging and tracing enabled, no token is in the log or the traces. The cleanup of start searches the log for tokens.
func TestTracedRequests(t *testing.T) {
	t.Parallel()
	agent, err := net.ListenPacket("udp", "127.0.0.1:0")
	require.NoError(t, err)
	traces := make(chan []byte)
	go func() {
		var all []byte
		for packet := make([]byte, 1<<16); ; {
			n, _, err := agent.ReadFrom(packet)
			if err != nil {
				traces <- all
				return
			}
			all = append(all, packet[:n]...)
		}
	}()
	s := start(t, homeserver.Config{TraceHTTP: true, Jaeger: agent.LocalAddr().String()})
	alice := s.newUser(t)
	roomID := s.room(t, alice)
	message, state := alice.sendMessage(t, roomID, 600), alice.sendState(t, roomID, "x", 600, nil)
	expiring := alice.sendState(t, roomID, "expiring", 1, nil)
	s.refreshed(t, message.token)
	code, _ := s.keepAlive(t, "end", state.token)
	require.Equal(t, http.StatusOK, code)
	s.refused(t, state.token)
	alice.follow(t, roomID).awaitClosing(t, expiring.eventID, "expired")
	// These requests have tokens in wrong places and are refused. The answers must not repeat the tokens either.
	for path, body := range map[string]JSON{
		keepAlivePath + "refresh?expire_refresh_token=" + message.token: {"expire_refresh_token": []string{message.token}},
		keepAlivePath + "end?token=" + message.token:                    {"token": message.token},
		homeserver.StatePath(roomID, memberType, "x"):                   {"m.will_expire": message.token},
	} {
		require.Equal(t, http.StatusBadRequest, alice.do(t, http.MethodPut, path, body).Code)
	}
	written, err := s.Written()
	require.NoError(t, err)
	require.Contains(t, string(written), "room_id", "Dendrite traces other requests")

	require.NoError(t, s.Stop()) // which sends the remaining traces
	require.NoError(t, agent.Close())
	collected := <-traces
	for _, want := range []string{"expiration_keep_alive", "send_message"} {
		require.Contains(t, string(collected), want, "there are no traces")
	}
	s.searchForTokens(t, "the traces", collected)
}

// A request that panics is answered. Its stack does not show the token, and it releases its locks.
func TestPanickingRequests(t *testing.T) {
	t.Parallel()
	s := startWithFailpoints(t, homeserver.Config{TraceHTTP: true})
	s.panics = true
	alice := s.newUser(t)
	sent := alice.sendState(t, s.room(t, alice), "key", 600, nil)
	for _, panicking := range []struct {
		at     failpoint.Point
		method string
	}{{failpoint.BeforeRefresh, "refresh"}, {failpoint.BeforeClaim, "end"}} {
		require.NoError(t, s.Failpoints(string(panicking.at)+" panic"))
		code, _ := s.keepAlive(t, panicking.method, sent.token)
		require.Equal(t, http.StatusInternalServerError, code)
		require.NoError(t, s.Failpoints())
		s.refreshed(t, sent.token)
	}
	written, err := s.Written()
	require.NoError(t, err)
	require.Contains(t, string(written), "failpoint before-claim", "the stack is in the log")
	code, errcode := s.keepAlive(t, "end", sent.token)
	require.Equal(t, http.StatusOK, code, errcode)
}
