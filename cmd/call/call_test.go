//go:build all

package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

var (
	// buildTimeout limits all downloads and builds, and soon every other step.
	buildTimeout = patience.For(15 * time.Minute)
	soon         = patience.For(time.Minute)
)

type object = map[string]any

// running is the command, as a user runs it.
type running struct {
	cmd   *exec.Cmd
	lines chan string
}

// start builds the command and runs it.
func start(t *testing.T, dir string) *running {
	t.Helper()
	if _, err := exec.LookPath("npm"); err != nil && os.Getenv("CI") == "" {
		t.Skip("NOT TESTED: npm is missing")
	}
	binary := filepath.Join(t.TempDir(), "call")
	out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	r := &running{cmd: exec.Command(binary), lines: make(chan string, 1000)}
	r.cmd.Env, r.cmd.Stderr = append(os.Environ(), "TMPDIR="+dir), os.Stderr
	stdout, err := r.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, r.cmd.Start())
	go func() {
		defer close(r.lines)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			r.lines <- lines.Text()
		}
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Signal(os.Interrupt)
		for line := range r.lines {
			t.Log(line)
		}
		_ = r.cmd.Wait()
	})
	return r
}

// await waits for a line, and returns what its pattern's groups match.
func (r *running) await(t *testing.T, timeout time.Duration, pattern string) []string {
	t.Helper()
	for deadline := time.After(timeout); ; {
		select {
		case line, more := <-r.lines:
			require.True(t, more, "the command ended, and did not print %s", pattern)
			t.Log(line)
			if match := regexp.MustCompile(pattern).FindStringSubmatch(line); match != nil {
				return match[1:]
			}
		case <-deadline:
			t.Fatalf("the command did not print %s", pattern)
		}
	}
}

// A participant that does as Element Call does joins, hands over its leave event, and disappears. After Ctrl-C nothing is left.
func TestCall(t *testing.T) {
	dir := t.TempDir()
	r := start(t, dir)
	server := r.await(t, buildTimeout, `(http://localhost:\d+)/join/Alice`)[0]
	r.await(t, soon, `http://127\.0\.0\.1:\d+/join/Bob`)

	alice := &homeserver.Client{URL: server, HTTP: &http.Client{
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	page := must(t, alice, http.MethodGet, "/join/Alice", nil, http.StatusFound)
	_, query, _ := strings.Cut(page.Header.Get("Location"), "?")
	link, err := url.ParseQuery(query)
	require.NoError(t, err)
	require.Contains(t, string(must(t, alice, http.MethodGet, "/room/", nil, http.StatusOK).Body), "Element Call")

	account := must(t, alice, http.MethodPost, "/_matrix/client/v3/register", object{
		"username": "alice", "password": homeserver.Password, "auth": object{"type": "m.login.dummy"},
	}, http.StatusOK)
	alice.UserID, alice.Token = account.Get("user_id").Str, account.Get("access_token").Str
	room, device := link.Get("roomId"), account.Get("device_id").Str
	must(t, alice, http.MethodPut, "/_matrix/client/v3/profile/"+alice.UserID+"/displayname", object{"displayname": link.Get("displayName")}, http.StatusOK)
	require.NoError(t, alice.Join(t.Context(), room))

	transports := must(t, alice, http.MethodGet, "/_matrix/client/unstable/org.matrix.msc4143/rtc/transports", nil, http.StatusOK)
	service := strings.TrimPrefix(transports.Get("rtc_transports.0.livekit_service_url").Str, server)
	token := func(more object) homeserver.Response {
		openID := must(t, alice, http.MethodPost, "/_matrix/client/v3/user/"+alice.UserID+"/openid/request_token", object{}, http.StatusOK)
		more["room"], more["device_id"], more["openid_token"] = room, device, openID.Get("@this").Value()
		return must(t, alice, http.MethodPost, service+"/sfu/get", more, http.StatusOK)
	}
	sfu := token(object{})
	state := homeserver.StatePath(room, memberType, "_"+alice.UserID+"_"+device+"_m.call")
	const delay = 3000 // milliseconds
	leave := must(t, alice, http.MethodPut, fmt.Sprintf("%s?org.matrix.msc4140.delay=%d", state, delay), object{}, http.StatusOK)
	must(t, alice, http.MethodPut, state, object{"device_id": device}, http.StatusOK)
	r.await(t, soon, `Alice +joined the call`)
	conn := connect(t, sfu.Get("url").Str+"/rtc?protocol=15&access_token="+sfu.Get("jwt").Str)
	r.await(t, soon, `Alice +connected to LiveKit`)
	token(object{"delay_id": leave.Get("delay_id").Str, "delay_timeout": delay})
	r.await(t, soon, `Alice +kept alive by the SFU`)
	require.NoError(t, conn.Close())
	r.await(t, soon, `Alice +disconnected from LiveKit`)
	r.await(t, soon, `Alice +gone after \d+\.\d s`)

	require.NoError(t, r.cmd.Process.Signal(os.Interrupt))
	r.await(t, soon, `Ended`)
	require.NoError(t, r.cmd.Wait())
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
	_, err = net.Dial("tcp", strings.TrimPrefix(server, "http://"))
	require.Error(t, err)
}

func must(t *testing.T, c *homeserver.Client, method, path string, body any, code int) homeserver.Response {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	defer cancel()
	res, err := c.Do(ctx, method, path, body)
	require.NoError(t, err)
	require.Equal(t, code, res.Code, "%s %s: %s", method, path, res)
	return res
}

// connect opens a WebSocket, and sends nothing over it.
func connect(t *testing.T, at string) net.Conn {
	t.Helper()
	u, err := url.Parse(at)
	require.NoError(t, err)
	conn, err := net.Dial("tcp", u.Host)
	require.NoError(t, err)
	_, err = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n", u.RequestURI(), u.Host)
	require.NoError(t, err)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	require.Equal(t, http.StatusSwitchingProtocols, res.StatusCode)
	return conn
}
