//go:build all

// Package livekit_test tries package rtc/livekit on the real LiveKit, and against LiveKit's own library, and the homeserver with participants
// of LiveKit's SDK. It is in a module of its own, so that LiveKit's dependencies stay out of the homeserver's.
package livekit_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	sfu "github.com/livekit/protocol/livekit"
	"github.com/livekit/protocol/webhook"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

var (
	// soon is longer than any step of these tests takes.
	soon = patience.For(30 * time.Second)
	// buildTimeout limits the download and the build of LiveKit.
	buildTimeout = patience.For(15 * time.Minute)
	// binary is the path of LiveKit's server, and dendrite that of the homeserver.
	binary, dendrite string
)

const (
	key    = "matrix"
	secret = "0123456789abcdef0123456789abcdef"
	other  = "fedcba9876543210fedcba9876543210"
)

var (
	room  = livekit.RoomName("!r:example.com", "m.call#ROOM")
	alice = livekit.Participant{Room: room, Identity: livekit.Identity("@alice:example.com", "member")}
	bob   = livekit.Participant{Room: room, Identity: "@bob:example.com:DEVICE"}
)

func TestMain(m *testing.M) {
	if token := os.Getenv(participantToken); token != "" {
		participate(os.Getenv(participantURL), token)
		return
	}
	dir, err := os.MkdirTemp("", "msc4140-livekit-")
	if err == nil {
		binary = filepath.Join(dir, "livekit-server")
		err = build(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	webhook.InitWebhookStats(nil) // LiveKit's notifier counts
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// build builds the LiveKit of docs/element-call.md, with the dependencies that LiveKit chose, and the homeserver, with those of its module.
func build(dir string) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), buildTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "build", "-o", binary, "github.com/livekit/livekit-server/cmd/server")
	cmd.Dir = "../elementcall/livekit"
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building LiveKit: %w\n%s", err, out)
	}
	if err = os.Setenv(homeserver.Tree, "../.."); err != nil {
		return err
	}
	dendrite, err = homeserver.Build(ctx, dir)
	return err
}

// received is a webhook as it came.
type received struct {
	authorization string
	body          []byte
}

// receive returns the URL of a server for webhooks, and the webhooks that it gets.
func receive(t *testing.T) (string, chan received) {
	t.Helper()
	webhooks := make(chan received, 1000)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err == nil {
			webhooks <- received{r.Header.Get("Authorization"), body}
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, webhooks
}

// server is a LiveKit that runs.
type server struct {
	address  string
	process  *os.Process
	webhooks chan received
}

// start runs LiveKit until the test ends, configured as docs/element-call.md says, but on loopback alone, and without rooms that it makes
// itself.
func start(t *testing.T) *server {
	t.Helper()
	url, webhooks := receive(t)
	s := startAt(t, freeAddress(t), url)
	s.webhooks = webhooks
	return s
}

// startAt is start with an address, and with a URL for webhooks.
func startAt(t *testing.T, address, url string) *server {
	t.Helper()
	s := &server{address: address}
	_, port, _ := net.SplitHostPort(s.address)
	_, udp, _ := net.SplitHostPort(freeAddress(t))
	_, tcp, _ := net.SplitHostPort(freeAddress(t))
	dir := t.TempDir()
	config := filepath.Join(dir, "livekit.yaml")
	require.NoError(t, os.WriteFile(config, []byte(fmt.Sprintf(`
port: %s
bind_addresses: [127.0.0.1]
rtc: {udp_port: %s, tcp_port: %s, node_ip: 127.0.0.1, enable_loopback_candidate: true, interfaces: {includes: [lo]}}
keys: {%s: %s}
room: {auto_create: false}
webhook: {api_key: %s, urls: [%q]}
`, port, udp, tcp, key, secret, key, url)), 0o600))
	log, err := os.Create(filepath.Join(dir, "log"))
	require.NoError(t, err)
	cmd := exec.Command(binary, "--config", config)
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	s.process = cmd.Process
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		if text, err := os.ReadFile(log.Name()); t.Failed() && err == nil {
			t.Logf("LiveKit's log:\n%s", text)
		}
	})
	await(t, "LiveKit's port", func() bool {
		conn, err := net.Dial("tcp", s.address)
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return s
}

// client returns a client with the right key and secret.
func (s *server) client() *livekit.Client {
	return livekit.New(livekit.Config{APIURL: "http://" + s.address, Key: key, Secret: secret})
}

// connect connects a participant, as far as LiveKit can without media, and returns what LiveKit says about the participant.
func (s *server) connect(t *testing.T, token string) (*websocket.Conn, *sfu.ParticipantInfo) {
	t.Helper()
	conn, _, err := s.dial(token)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetReadDeadline(time.Now().Add(soon))
	_, message, err := conn.ReadMessage()
	require.NoError(t, err)
	var response sfu.SignalResponse
	require.NoError(t, proto.Unmarshal(message, &response))
	require.NotNil(t, response.GetJoin(), "%v", &response)
	_ = conn.SetReadDeadline(time.Time{})
	return conn, response.GetJoin().Participant
}

func (s *server) dial(token string) (*websocket.Conn, *http.Response, error) {
	return websocket.DefaultDialer.Dial("ws://"+s.address+"/rtc?protocol=15", http.Header{"Authorization": {"Bearer " + token}})
}

// connection is a participant's connection, which is read until either side closes it.
type connection struct {
	*websocket.Conn
	closed chan struct{}
}

// join connects a participant with a token of ours.
func (s *server) join(t *testing.T, p livekit.Participant) (connection, *sfu.ParticipantInfo) {
	t.Helper()
	token, err := s.client().Token(livekit.Grant{Participant: p, Publish: true})
	require.NoError(t, err)
	conn, info := s.connect(t, token)
	c := connection{conn, make(chan struct{})}
	go func() {
		defer close(c.closed)
		for err := error(nil); err == nil; {
			_, _, err = c.ReadMessage()
		}
	}()
	return c, info
}

// freeAddress returns a loopback address with a port that is free at the moment, for TCP and for UDP.
func freeAddress(t *testing.T) string {
	t.Helper()
	for {
		tcp, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		_ = tcp.Close()
		if err == nil {
			_ = udp.Close()
			return tcp.Addr().String()
		}
	}
}

// await returns when a condition is true.
func await(t *testing.T, what string, isSo func() bool) {
	t.Helper()
	for deadline := time.Now().Add(soon); !isSo(); time.Sleep(pollInterval) {
		if time.Now().After(deadline) {
			t.Fatalf("did not come: %s", what)
		}
	}
}

const pollInterval = 20 * time.Millisecond
