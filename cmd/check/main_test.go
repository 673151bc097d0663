package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/fakelivekit"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// checker is the command under test. ours is our homeserver, and stock is Dendrite's own.
var checker, ours, stock string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "msc4140-check-")
	if err == nil {
		ours, err = homeserver.Build(context.Background(), dir)
	}
	checker, stock = filepath.Join(dir, "check"), filepath.Join(dir, "stock")
	for name, pkg := range map[string]string{checker: ".", stock: "github.com/matrix-org/dendrite/cmd/dendrite"} {
		if err == nil {
			err = run("go", "build", "-o", name, pkg)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func run(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// start starts a homeserver with this configuration.
func start(t *testing.T, binary string, cfg homeserver.Config) *homeserver.Server {
	t.Helper()
	hs, err := homeserver.New(binary, t.TempDir(), cfg)
	require.NoError(t, err)
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	return hs
}

// withSFU is the configuration of a homeserver whose calls use an SFU, with a service that gives out tokens and takes leave events.
func withSFU(t *testing.T) homeserver.Config {
	liveKit := fakelivekit.Start()
	t.Cleanup(liveKit.Close)
	return withService(t, &service{liveKit: liveKit, takes: true})
}

// checked runs the command. It returns the exit status, the output, and the names of the features by result.
func checked(t *testing.T, env []string, args ...string) (code int, printed string, found map[string][]string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), checker, args...)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run()
	found = map[string][]string{}
	lines, summary, _ := strings.Cut(out.String(), "\nunknown ")
	summary = strings.Join(strings.Fields(summary), " ")
	for _, f := range features {
		if regexp.MustCompile(`(not tried: |; )` + regexp.QuoteMeta(f.name) + `(; | unknown | Calls )`).MatchString(summary) {
			found["unknown"] = append(found["unknown"], f.name)
		}
	}
	for line := range strings.Lines(lines) {
		for _, f := range features {
			if word, rest, ok := strings.Cut(line, " "); ok && strings.HasPrefix(strings.TrimLeft(rest, " ")+" ", f.name+"  ") {
				found[word] = append(found[word], f.name)
			}
		}
	}
	return cmd.ProcessState.ExitCode(), out.String(), found
}

// On our server every feature works, whatever the account is and whoever makes the tokens, and the check leaves nothing behind.
func TestOurs(t *testing.T) {
	liveKit := fakelivekit.Start()
	t.Cleanup(liveKit.Close)
	hs := start(t, ours, withLiveKit(liveKit, liveKit.URL))
	alice, err := hs.Register(t.Context(), "alice")
	require.NoError(t, err)
	for name, test := range map[string]struct {
		on        *homeserver.Server
		env, args []string
	}{
		"OpenRegistration":   {on: hs},
		"RegistrationSecret": {on: hs, args: []string{"--registration-secret", homeserver.SharedSecret}},
		"Password":           {on: hs, args: []string{"--user", "alice"}, env: []string{"PASSWORD=" + homeserver.Password}},
		"AccessToken":        {on: hs, env: []string{"ACCESS_TOKEN=" + alice.Token}},
		"AnotherService":     {on: start(t, ours, withSFU(t))},
	} {
		t.Run(name, func(t *testing.T) {
			code, printed, found := checked(t, test.env, append(test.args, "--server", test.on.URL)...)
			require.Equal(t, 0, code, printed)
			require.Len(t, found["ok"], len(features), printed)
			require.NotContains(t, printed, "left behind")
			require.NotContains(t, printed, homeserver.Password)
			require.NotContains(t, printed, "eyJ", "a token for LiveKit")
		})
	}
	rooms, err := alice.Do(t.Context(), http.MethodGet, "/_matrix/client/v3/joined_rooms", nil)
	require.NoError(t, err)
	require.Equal(t, "[]", rooms.Get("joined_rooms").Raw)
	devices, err := alice.Do(t.Context(), http.MethodGet, "/_matrix/client/v3/devices", nil)
	require.NoError(t, err)
	require.Len(t, devices.Get("devices").Array(), 1, devices)
	scheduled, err := alice.Do(t.Context(), http.MethodGet, "/_matrix/client/unstable/org.matrix.msc4140/delayed_events", nil)
	require.NoError(t, err)
	require.Equal(t, "[]", scheduled.Get("delayed_events").Raw)
}

// For stock Dendrite the command reports the missing features, and no others.
func TestStock(t *testing.T) {
	hs := start(t, stock, withSFU(t))
	code, printed, found := checked(t, nil, "--server", hs.URL)
	require.Equal(t, exitMissing, code, printed)
	require.Equal(t, []string{
		"/versions: org.matrix.msc4140", "/versions: org.matrix.msc4222", "transports: there or in the well-known file",
		"/sync: state_after", "delayed leave: scheduled", "room summary",
	}, found["MISSING"], printed)
	require.Equal(t, []string{
		"/versions: org.matrix.msc4140.stable", "/versions: org.matrix.msc4143", "well-known: where calls go",
		"/capabilities: limits of delayed events", "transports: asked for", "expiring event: sent, refreshed, ended",
	}, found["missing"], printed)
	require.Equal(t, []string{
		"client API", "well-known: where the server is", "an account", "a room", "to-device message", "OpenID token",
		"browsers may ask all of that",
	}, found["ok"], printed)
	require.Len(t, found["unknown"], len(features)-6-6-7, printed)
	require.NotContains(t, printed, "left behind")
}

// The sample in docs/operations.md is what the command prints for a server without the section matrix_rtc, apart from durations.
func TestSample(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operations.md")
	require.NoError(t, err)
	_, sample, _ := strings.Cut(string(doc), "```\nok       ")
	sample, _, ok := strings.Cut(sample, "```")
	require.True(t, ok)
	_, printed, _ := checked(t, nil, "--server", start(t, ours, homeserver.Config{WellKnown: true}).URL)
	printed = regexp.MustCompile(` +\n`).ReplaceAllString(printed, "\n")
	for line := range strings.Lines("ok       " + sample) {
		line, _, _ = strings.Cut(line, " 90ms")
		require.Contains(t, printed, line)
	}
}

// An unreachable server is a finding. A wrong command line is not.
func TestExitStatus(t *testing.T) {
	gone := httptest.NewServer(nil)
	gone.Close()
	code, printed, found := checked(t, nil, "--server", gone.URL)
	require.Equal(t, exitMissing, code, printed)
	require.Contains(t, found["MISSING"], "client API")
	for _, args := range [][]string{
		nil, {"--server", "example.com"}, {"--server", "ftp://example.com"}, {"--server", gone.URL, "more"},
		{"--server", gone.URL, "--user", "alice"}, {"--none"},
	} {
		code, printed, _ = checked(t, nil, args...)
		require.Equal(t, exitUsage, code, printed)
		require.Contains(t, printed, "--server", "how to call it")
	}
}

// startProxy starts a reverse proxy in front of a server. It answers a request itself with the code of refuse, if that is not 0, and lets
// change change all other answers. Both may be nil.
func startProxy(t *testing.T, hs *homeserver.Server, refuse func(*http.Request) (code int), change func(*http.Response) error) *httptest.Server {
	target, err := url.Parse(hs.URL)
	require.NoError(t, err)
	behind := httputil.NewSingleHostReverseProxy(target)
	behind.ModifyResponse = change
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if refuse != nil {
			if code := refuse(req); code != 0 {
				w.Header().Set("Access-Control-Allow-Origin", "*")
				w.WriteHeader(code)
				return
			}
		}
		behind.ServeHTTP(w, req)
	}))
	t.Cleanup(proxy.Close)
	return proxy
}

// The command finds the faults of a server or of its proxy, and reports nothing else.
func TestFaults(t *testing.T) {
	cfg := withSFU(t)
	cfg.WellKnown = false // the well-known file would bypass the proxy
	cfg.Expiration = homeserver.JSON{"delayed_events": homeserver.JSON{"max_delay": "10m"}}
	hs := start(t, ours, cfg)
	const longDelay = "delayed leave: due in an hour"
	restarts := 0
	for name, fault := range map[string]struct {
		// refuse decides which requests the proxy answers itself. spoil changes the headers, and rename names in the bodies, of the others.
		refuse           func(*http.Request) (code int)
		spoil            func(http.Header)
		rename           *strings.Replacer
		MISSING, missing []string
	}{
		"ShortDelays": {MISSING: []string{longDelay}},
		"NoHeaders": {
			spoil:   func(header http.Header) { header.Del("Access-Control-Allow-Origin") },
			MISSING: []string{longDelay, "browsers may ask all of that"},
		},
		"NoPreflights": {
			refuse: func(req *http.Request) int {
				if req.Method == http.MethodOptions {
					return http.StatusMethodNotAllowed
				}
				return 0
			},
			MISSING: []string{longDelay, "browsers may ask all of that"},
		},
		"AccessTokens": {
			refuse: func(req *http.Request) int {
				if strings.Contains(req.URL.Path, "/delayed_events/") && req.Method == http.MethodPost && req.Header.Get("Authorization") == "" {
					return http.StatusUnauthorized
				}
				return 0
			},
			MISSING: []string{
				"delayed leave: restarted, without a token", "delayed leave: sent, without a token", "delayed leave: 404 afterwards", longDelay,
			},
			missing: []string{"delayed leave: ten restarts at once", "delayed leave: cancelled"},
		},
		"OldNames": {
			rename:  strings.NewReplacer(`"delayed_since_ts"`, `"scheduled_at"`, `"finalised"`, `"finalized"`),
			MISSING: []string{longDelay},
			missing: []string{"delayed leave: looked up", "delayed events on the stable paths"},
		},
		"LowLimit": {
			refuse: func(req *http.Request) int {
				if !strings.HasSuffix(req.URL.Path, "/restart") || req.Method != http.MethodPost {
					return 0
				}
				if restarts++; restarts == 7 {
					return http.StatusTooManyRequests
				}
				return 0
			},
			MISSING: []string{longDelay},
			missing: []string{"delayed leave: ten restarts at once"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			proxy := startProxy(t, hs, fault.refuse, func(res *http.Response) error {
				if fault.spoil != nil {
					fault.spoil(res.Header)
				}
				if fault.rename == nil {
					return nil
				}
				body, err := io.ReadAll(res.Body)
				renamed := fault.rename.Replace(string(body))
				res.Body, res.ContentLength = io.NopCloser(strings.NewReader(renamed)), int64(len(renamed))
				res.Header.Set("Content-Length", strconv.Itoa(len(renamed)))
				return err
			})
			code, printed, found := checked(t, nil, "--server", proxy.URL)
			require.Equal(t, exitMissing, code, printed)
			require.Equal(t, fault.MISSING, found["MISSING"], printed)
			require.Equal(t, append([]string{"well-known: where the server is", "well-known: where calls go"}, fault.missing...), found["missing"], printed)
			require.Empty(t, found["unknown"], printed)
		})
	}
}

// Without an account most features stay unknown, and the result is a failure.
func TestNoAccount(t *testing.T) {
	hs, err := homeserver.NewInHome(ours, t.TempDir())
	require.NoError(t, err)
	require.NoError(t, hs.Start(t.Context()))
	t.Cleanup(hs.Kill)
	code, printed, found := checked(t, nil, "--server", hs.URL)
	require.Equal(t, exitMissing, code, printed)
	require.Equal(t, []string{"transports: there or in the well-known file"}, found["MISSING"], printed)
	require.Contains(t, found["unknown"], "an account", printed)
	require.Greater(t, len(found["unknown"]), 20, printed)
	require.Equal(t, 1, strings.Count(printed, "\nunknown "), "one cause is named once: %s", printed)
	require.Contains(t, printed, "--registration-secret", printed)
	code, printed, found = checked(t, nil, "--server", hs.URL, "--user", "alice", "--password", "wrong")
	require.Equal(t, exitMissing, code, printed)
	require.Contains(t, found["MISSING"], "an account", printed)
}
