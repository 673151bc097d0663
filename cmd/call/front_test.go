package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// world is a front with a homeserver and a LiveKit that do as the test says.
type world struct {
	url        string
	watch      *watch
	homeserver http.HandlerFunc
	sfu        http.HandlerFunc
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "assets"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "index.html"), []byte("<html><head><title>"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte("{}"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "assets", "a.js"), []byte("script"), 0o600))
	p, err := openPages(dir)
	require.NoError(t, err)
	w := &world{watch: newWatch(newScreen(&bytes.Buffer{}))}
	serve := func(h http.Handler) string {
		server := httptest.NewServer(h)
		t.Cleanup(server.Close)
		return server.URL
	}
	f := &front{pages: p, watch: w.watch, hsToken: "right", room: "!r:localhost"}
	handler, err := f.handler(
		serve(http.HandlerFunc(func(res http.ResponseWriter, req *http.Request) { w.homeserver(res, req) })),
		serve(http.HandlerFunc(func(res http.ResponseWriter, req *http.Request) { w.sfu(res, req) })),
	)
	require.NoError(t, err)
	w.url = serve(handler)
	return w
}

// known returns what the watch knows about alice.
func (w *world) known() (now participant) {
	w.watch.mu.Lock()
	defer w.watch.mu.Unlock()
	if p := w.watch.participants[alice]; p != nil {
		now = *p
	}
	return now
}

// do sends a request, and returns the status and the body of the answer.
func (w *world) do(t *testing.T, method, path, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, w.url+path, strings.NewReader(body))
	require.NoError(t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	require.NoError(t, err)
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(text) + res.Header.Get("Location")
}

var alice = livekit.Participant{Room: "room", Identity: "@a:localhost:A"}

func tokenOfAlice(t *testing.T) string {
	t.Helper()
	token, err := livekit.New(livekit.Config{Key: "key", Secret: "secret"}).Token(livekit.Grant{Participant: alice})
	require.NoError(t, err)
	return token
}

// Every path that is not a file is a call, and leads to the same page. No path leads out of the folder.
func TestPages(t *testing.T) {
	w := newWorld(t)
	const index = `<html><head><base href="/"><title>`
	for path, want := range map[string]string{
		"/":                index,
		"/index.html":      index,
		"/room/":           index,
		"/assets/":         index,
		"/%2e%2e/index.js": index,
		"/assets/a.js":     "script",
	} {
		_, body := w.do(t, http.MethodGet, path, "")
		require.Equal(t, want, body, path)
	}
	_, body := w.do(t, http.MethodGet, "/config.json", "")
	require.JSONEq(t, `{"default_server_config": {"m.homeserver": {"base_url": "`+w.url+`", "server_name": "localhost"}}}`, body)
}

// Everybody gets the same password, and the name in the path.
func TestJoin(t *testing.T) {
	w := newWorld(t)
	status, alice := w.do(t, http.MethodGet, "/join/Alice%20A", "")
	require.Equal(t, http.StatusFound, status)
	_, bob := w.do(t, http.MethodGet, "/join/Bob", "")
	require.Contains(t, alice, "/room/#/call?displayName=Alice+A&password=")
	require.Contains(t, alice, "&roomId=%21r%3Alocalhost&viaServers=localhost")
	require.Contains(t, bob, strings.Split(alice, "displayName=Alice+A")[1])
}

// Only an answer of success, to a request that has a leave event, tells that the homeserver has taken it over.
func TestLeavesAreSeen(t *testing.T) {
	for _, test := range []struct {
		path, body string
		status     int
		kept       bool
	}{
		{servicePath + "/sfu/get", `{"room": "r", "delay_id": "d", "delay_timeout": 1}`, http.StatusOK, true},
		{servicePath + "/get_token", `{"delay_id": "d", "delay_timeout": 1}`, http.StatusOK, true},
		{servicePath + "/sfu/get", `{"room": "r"}`, http.StatusOK, false},
		{servicePath + "/sfu/get", `{"room": "r", "delay_id": "d"}`, http.StatusBadRequest, false},
		{"/_matrix/client/v3/sync", `{"delay_id": "d"}`, http.StatusOK, false},
	} {
		w := newWorld(t)
		w.watch.connected(alice) // so that it is not forgotten
		answer := `{"url": "ws://localhost", "jwt": "` + tokenOfAlice(t) + `"}`
		w.homeserver = func(res http.ResponseWriter, req *http.Request) {
			body, err := io.ReadAll(req.Body)
			require.NoError(t, err)
			require.Equal(t, test.path+test.body, req.URL.Path+string(body))
			res.WriteHeader(test.status)
			_, _ = io.WriteString(res, answer)
		}
		status, body := w.do(t, http.MethodPost, test.path, test.body)
		require.Equal(t, test.status, status)
		require.Equal(t, answer, body)
		require.Equal(t, test.kept, w.known().kept, "%s %s %d", test.path, test.body, test.status)
	}
}

// A connection counts from when LiveKit has accepted it until it ends.
func TestConnectionsAreSeen(t *testing.T) {
	w := newWorld(t)
	w.sfu = func(res http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Upgrade") == "" {
			http.Error(res, "no", http.StatusUnauthorized)
			return
		}
		require.Equal(t, "/rtc", req.URL.Path)
		conn, buffer, err := http.NewResponseController(res).Hijack()
		require.NoError(t, err)
		defer conn.Close()
		_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		_, _ = buffer.ReadByte() // until the client goes
	}
	w.watch.participants[alice] = &participant{joined: true}
	path := sfuPath + "/rtc?access_token=" + tokenOfAlice(t)
	status, _ := w.do(t, http.MethodGet, path, "")
	require.Equal(t, http.StatusUnauthorized, status)
	require.Equal(t, participant{joined: true}, w.known())

	conn, err := net.Dial("tcp", strings.TrimPrefix(w.url, "http://"))
	require.NoError(t, err)
	defer conn.Close()
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", path)
	require.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	_ = res.Body.Close()
	require.Equal(t, http.StatusSwitchingProtocols, res.StatusCode)
	require.Equal(t, 1, w.known().connections)
	require.NoError(t, conn.Close())
	require.Eventually(t, func() bool { return !w.known().lost.IsZero() }, patience.For(10*time.Second), 10*time.Millisecond)
}

// Only the homeserver may tell of events.
func TestEventsAreTheHomeservers(t *testing.T) {
	body := `{"events": [` + membership("@a:localhost", "A", `{"device_id": "A"}`).Raw + `]}`
	for token, want := range map[string]int{"Bearer right": http.StatusOK, "Bearer wrong": http.StatusForbidden, "": http.StatusForbidden} {
		w := newWorld(t)
		status, _ := w.do(t, http.MethodPut, "/_matrix/app/v1/transactions/1", body, "Authorization", token)
		require.Equal(t, want, status)
		require.Equal(t, want == http.StatusOK, len(w.watch.members) == 1)
	}
}

// The token of LiveKit tells whom it is for. Whoever has none is nobody.
func TestParticipantOf(t *testing.T) {
	p, known := participantOf(tokenOfAlice(t))
	require.True(t, known)
	require.Equal(t, alice, p)
	admin, err := jwt.New(jwt.SigningMethodHS256).SignedString([]byte("secret"))
	require.NoError(t, err)
	for _, token := range []string{"", "a.b.c", admin} {
		_, known = participantOf(token)
		require.False(t, known, token)
	}
}
