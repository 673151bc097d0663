//go:build all

package livekit_test

import (
	"bufio"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	lksdk "github.com/livekit/server-sdk-go/v2"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// The environment variables with which this test binary is a participant.
const (
	participantURL   = "PARTICIPANT_URL"
	participantToken = "PARTICIPANT_TOKEN"
)

// isIn is what a participant prints when it has joined.
const isIn = "joined"

// participate joins a room with LiveKit's SDK, and stays until SIGTERM.
func participate(url, token string) {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	room, err := lksdk.ConnectToRoomWithToken(url, token, lksdk.NewRoomCallback())
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(isIn)
	<-stop
	room.Disconnect()
}

// enter starts a participant in a process of its own, and returns when it has joined.
func (s *server) enter(t *testing.T, token string) *os.Process {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), participantURL+"=ws://"+s.address, participantToken+"="+token)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if said.WriteString(lines.Text() + "\n"); lines.Text() == isIn {
			return cmd.Process
		}
	}
	t.Fatalf("the participant did not join:\n%s", &said)
	return nil
}

const (
	// servicePath is where the homeserver serves the API of lk-jwt-service, and takes LiveKit's webhooks.
	servicePath = "/_matrix/client/unstable/io.element.msc4195/livekit"
	memberType  = "m.call.member"
	// life is how long the event runs without keep-alives, in seconds.
	life = 10
)

// The token of an expiring event is handed over to the homeserver. The event runs for as long as the participant is connected, without any
// keep-alive of the client, and ends when the participant leaves or crashes, even if the homeserver was killed in between.
func TestTokenOfTheDraft(t *testing.T) {
	address := freeAddress(t)
	hs, err := homeserver.New(dendrite, t.TempDir(), homeserver.Config{WellKnown: true, MatrixRTC: homeserver.JSON{"livekit": homeserver.JSON{
		"url": "ws://" + address, "api_key": key, "api_secret": secret,
	}}})
	require.NoError(t, err)
	s := startAt(t, address, hs.URL+servicePath+"/sfu_webhook")
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	user, err := hs.Register(t.Context(), "alice")
	require.NoError(t, err)
	must := func(method, path string, body any) homeserver.Response {
		t.Helper()
		res, err := user.Do(t.Context(), method, path, body)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, res.Code, res)
		return res
	}
	roomID, err := user.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	isRunning := func() bool {
		state := must(http.MethodGet, homeserver.StatePath(roomID, memberType, user.UserID), nil)
		return state.Get(`m\.will_expire`).Str == "running"
	}
	// join connects alice, and hands over the token of her membership.
	join := func() *os.Process {
		openID := must(http.MethodPost, "/_matrix/client/v3/user/"+url.PathEscape(user.UserID)+"/openid/request_token", homeserver.JSON{})
		token := must(http.MethodPost, servicePath+"/sfu/get", homeserver.JSON{
			"room": roomID, "openid_token": gjson.ParseBytes(openID.Body).Value(), "device_id": "DEV",
		}).Get("jwt").Str
		member := must(http.MethodPut, homeserver.StatePath(roomID, memberType, user.UserID), homeserver.JSON{"m.will_expire": life})
		alice := s.enter(t, token)
		must(http.MethodPut, "/_matrix/client/v3/expiration/delegate", homeserver.JSON{
			"expire_refresh_token": member.Get("expire_refresh_token").Str, "device_id": "DEV",
		})
		return alice
	}
	stays := func(long time.Duration) {
		t.Helper()
		for until := time.Now().Add(long); time.Now().Before(until); time.Sleep(time.Second) {
			require.True(t, isRunning(), "alice is connected")
		}
	}
	leaves := func(how string, alice *os.Process, with syscall.Signal, inTime time.Duration) {
		t.Helper()
		began := time.Now()
		require.NoError(t, alice.Signal(with))
		await(t, "the membership's end", func() bool { return !isRunning() })
		took := time.Since(began)
		t.Logf("alice %s: out after %s", how, took.Round(10*time.Millisecond))
		require.Less(t, took, inTime)
		state := must(http.MethodGet, homeserver.StatePath(roomID, memberType, user.UserID), nil)
		require.Equal(t, "ended", state.Get(`m\.will_expire`).Str)
	}
	alice := join()
	stays(1.5 * life * time.Second)
	leaves("left", alice, syscall.SIGTERM, 5*time.Second)

	alice = join()
	hs.Kill()
	require.NoError(t, hs.Start(t.Context()))
	stays(1.5 * life * time.Second)
	leaves("crashed", alice, syscall.SIGKILL, 25*time.Second)
}
