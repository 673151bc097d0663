//go:build all

package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// The keep-alive endpoint is open to the internet and needs no access token. Whatever strangers send to it, the server serves the holders
// of valid tokens, and the strangers' requests cost a bounded amount of memory.

const (
	// probePause keeps the rate of refreshes of one token below its limit.
	probePause = 150 * time.Millisecond
	// perConnection limits the heap and stack of a connection, in bytes. spare is how much the heap may vary for other reasons, mostly
	// garbage that is not collected yet.
	perConnection = 64 << 10
	spare         = 64 << 20
	keepAliveHead = "PUT " + keepAlivePath + "refresh HTTP/1.1\r\nHost: localhost\r\n"
)

var (
	// probePatience limits a keep-alive while the server is under attack.
	probePatience = patience.For(10 * time.Second)
	// hangUp limits the time until the server disconnects a client that does not finish its request.
	hangUp = patience.For(60 * time.Second)
)

func TestAbuse(t *testing.T) {
	s := start(t, homeserver.Config{})
	alice := s.newUser(t)
	a := &siege{s: s, token: alice.sendMessage(t, s.room(t, alice), 3600).token}
	// The first request allocates memory that stays.
	a.during(t, "nothing", func(t *testing.T) { s.refused(t, "guess") })
	a.during(t, "unfinished requests", func(t *testing.T) { testUnfinishedRequests(t, s) })
	a.during(t, "endless requests", func(t *testing.T) { testEndlessRequests(t, s) })
	a.during(t, "3000 connections", func(t *testing.T) { testManyConnections(t, s, 3000) })
	a.during(t, "guesses", func(t *testing.T) { testGuesses(t, s) })
	a.during(t, "one token hammered", func(t *testing.T) { testHammered(t, s, alice) })
	a.during(t, "oddities", func(t *testing.T) { testOddities(t, s, alice) })
	t.Log("\n" + strings.Join(a.table, "\n"))
}

// siege is a server under attack, and a valid token.
type siege struct {
	s     *server
	token string
	table []string
}

// during makes an attack. Meanwhile the valid token is refreshed repeatedly, and each refresh must succeed quickly. After the attack the
// server must use no more memory and goroutines than before.
func (a *siege) during(t *testing.T, name string, attack func(t *testing.T)) {
	t.Run(name, func(t *testing.T) {
		began := time.Now()
		before, err := a.s.usage(t.Context())
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(t.Context())
		var (
			probe    sync.WaitGroup
			peak     usage
			probes   int
			slowest  time.Duration
			stopOnce = func() { cancel(); probe.Wait() }
		)
		defer stopOnce()
		probe.Go(func() {
			for pause := time.NewTicker(probePause); ctx.Err() == nil; <-pause.C {
				sent := time.Now()
				res, err := a.s.Anonymous().KeepAlive(t.Context(), "refresh", a.token)
				took := time.Since(sent)
				if err != nil || res.Code != http.StatusOK || took > probePatience {
					t.Errorf("the valid token was not served: %v, %s, after %s", err, res, took)
					return
				}
				probes, slowest = probes+1, max(slowest, took)
				now, err := a.s.usage(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				peak = peak.max(now)
			}
		})
		attack(t)
		stopOnce()
		var after usage
		// Requests for the metrics make garbage, so that the server collects all its garbage after some time.
		eventuallyWithin(t, hangUp, "the server is as it was before", func() bool {
			after, err = a.s.usage(t.Context())
			require.NoError(t, err)
			return after.goroutines <= before.goroutines+50 && after.memory() <= before.memory()+spare/2
		})
		if a.table == nil {
			a.table = append(a.table, fmt.Sprintf("%-20s %-31s %-31s %-31s %7s %7s %6s",
				"attack", "before: MiB RSS, heap+stack, n", "peak", "after", "probes", "slowest", "took"))
		}
		a.table = append(a.table, fmt.Sprintf("%-20s %-31s %-31s %-31s %7d %7s %6s", name, before, peak, after, probes,
			slowest.Round(time.Millisecond), time.Since(began).Round(time.Second)))
	})
}

// The server gives up a request that is never completed, wherever the request stops.
func testUnfinishedRequests(t *testing.T, s *server) {
	const each = 50
	timeout, tooLarge := []string{"HTTP/1.1 400 Bad Request", ""}, []string{"HTTP/1.1 413 Request Entity Too Large"}
	// The head is read before any handler runs. Our own command has a timeout for it, Dendrite's does not.
	headless := []string{"nothing", "half a head", "a head byte by byte", "half a head after an answer"}
	ctx, cancel := context.WithCancel(t.Context())
	var wg, trickles sync.WaitGroup
	for what, test := range map[string]struct {
		sent, trickled string
		answers        []string
	}{
		"nothing":                      {"", "", []string{""}},
		"half a head":                  {"GET /_matrix/client/versions HTTP/1.1\r\nHost: local", "", []string{""}},
		"a head byte by byte":          {keepAliveHead, "X-Slow: 1\r\n", timeout},
		"half a head after an answer":  {keepAliveHead + "Content-Length: 2\r\n\r\n{}PUT ", "", timeout},
		"a chunk without end":          {keepAliveHead + "Transfer-Encoding: chunked\r\n\r\nff\r\n{", "", timeout},
		"chunks without end":           {keepAliveHead + "Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n", timeout},
		"no body":                      {keepAliveHead + "Content-Length: 100\r\n\r\n", "", timeout},
		"half a body":                  {keepAliveHead + "Content-Length: 100\r\n\r\n{", "", timeout},
		"a body byte by byte":          {keepAliveHead + "Content-Length: 4096\r\n\r\n", " ", timeout},
		"a body that is not continued": {keepAliveHead + "Expect: 100-continue\r\nContent-Length: 100\r\n\r\n", "", append(timeout, "HTTP/1.1 100 Continue")},
		"half of too much":             {keepAliveHead + "Content-Length: 6000\r\n\r\n" + strings.Repeat(" ", 5000), "", tooLarge},
		"too much in a chunk":          {keepAliveHead + "Transfer-Encoding: chunked\r\n\r\n2000\r\n" + strings.Repeat(" ", 5000), "", tooLarge},
		"too much, and byte by byte":   {keepAliveHead + "Transfer-Encoding: chunked\r\n\r\n1388\r\n" + strings.Repeat(" ", 5000), "\r\n1\r\n ", tooLarge},
		"a terabyte is announced":      {keepAliveHead + "Content-Length: 1099511627776\r\n\r\n{", "", timeout},
		"a terabyte, begun":            {keepAliveHead + "Content-Length: 1099511627776\r\n\r\n" + strings.Repeat(" ", 5000), "", tooLarge},
	} {
		if slices.Contains(headless, what) && os.Getenv(homeserver.Tree) != "" {
			continue
		}
		for i := range each {
			wg.Go(func() {
				c, err := s.stranger(t.Context(), i)
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				if _, err = io.WriteString(c, test.sent); err != nil {
					t.Errorf("%s: %s", what, err)
					return
				}
				if test.trickled != "" {
					trickles.Go(func() { c.trickle(ctx, test.trickled) })
				}
				status, err := c.awaitHangUp()
				if err != nil {
					t.Errorf("%s: %s (answer: %q)", what, err, status)
					return
				}
				for _, answer := range test.answers {
					if status == answer {
						return
					}
				}
				t.Errorf("%s: the answer is %q", what, status)
			})
		}
	}
	wg.Wait()
	cancel()
	trickles.Wait()
}

// The server disconnects a client that sends an endless request as fast as possible, and keeps none of it in memory.
func testEndlessRequests(t *testing.T, s *server) {
	// accepted is more than the server reads before it closes the connection, including the buffers of the sockets.
	const accepted = 32 << 20
	junk := bytes.Repeat([]byte("x"), 1<<16)
	chunk := fmt.Appendf(nil, "%x\r\n%s\r\n", len(junk), junk)
	var wg sync.WaitGroup
	for what, test := range map[string]struct {
		head   string
		repeat []byte
	}{
		"body":  {keepAliveHead + "Content-Length: 1099511627776\r\n\r\n", junk},
		"chunk": {keepAliveHead + "Transfer-Encoding: chunked\r\n\r\n", chunk},
		"head":  {keepAliveHead + "X-Long: ", junk},
		"heads": {keepAliveHead, []byte(strings.Repeat("X-Many: 1\r\n", 5000))},
		"path":  {"PUT " + keepAlivePath, junk},
	} {
		for i := range 4 {
			wg.Go(func() {
				c, err := s.stranger(t.Context(), i)
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(hangUp))
				written, err := io.WriteString(c, test.head)
				for err == nil && written < accepted {
					var n int
					n, err = c.Write(test.repeat)
					written += n
				}
				if timeout := net.Error(nil); err == nil || (errors.As(err, &timeout) && timeout.Timeout()) {
					t.Errorf("the server goes on reading a %s: %d bytes, %v", what, written, err)
				}
			})
		}
	}
	wg.Wait()
}

// Thousands of connections exist at once, and each stops at some point of its request.
func testManyConnections(t *testing.T, s *server, n int) {
	before, err := s.usage(t.Context())
	require.NoError(t, err)
	conns := make([]*stranger, n)
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	}()
	stops := []string{
		"", keepAliveHead, keepAliveHead + "Content-Length: 4000\r\n\r\n" + strings.Repeat(" ", 3000),
		// After an answer, the connection is kept for the next request.
		keepAliveHead + "Content-Length: 2\r\n\r\n{}",
	}
	for i := range conns {
		if conns[i], err = s.stranger(t.Context(), i); err == nil {
			_, err = io.WriteString(conns[i], stops[i%len(stops)])
		}
		require.NoError(t, err)
	}
	var during usage
	eventually(t, "all connections are accepted", func() bool {
		during, err = s.usage(t.Context())
		require.NoError(t, err)
		// Connections in the middle of a body time out after a while.
		return during.goroutines >= before.goroutines+float64(n)*0.7
	})
	require.Less(t, during.memory()-before.memory(), float64(n*perConnection), "%s, and before %s", during, before)
}

// The holder of a token can exhaust the limit of that token, and of no other.
func testHammered(t *testing.T, s *server, alice *user) {
	token := alice.sendMessage(t, s.room(t, alice), 3600).token
	var ok, limited atomic.Int64
	began := time.Now()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 100 {
				res, err := s.Anonymous().KeepAlive(t.Context(), "refresh", token)
				switch {
				case err != nil:
					t.Error(err)
				case res.Code == http.StatusOK:
					ok.Add(1)
				case res.Code == http.StatusTooManyRequests:
					limited.Add(1)
				default:
					t.Error(res)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1600, ok.Load()+limited.Load())
	require.LessOrEqual(t, float64(ok.Load()), 20+20*time.Since(began).Seconds()+1)
	eventually(t, "the token is served again", func() bool {
		code, _ := s.keepAlive(t, "refresh", token)
		return code == http.StatusOK
	})
}

// Unusual requests are answered like others, and never with an error of the server.
func testOddities(t *testing.T, s *server, alice *user) {
	token := alice.sendMessage(t, s.room(t, alice), 3600).token
	good := `{"expire_refresh_token":"` + token + `"}`
	lines := func(first, body string) string {
		return fmt.Sprintf("%s\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", first, len(body), body)
	}
	put := func(path string) string { return lines("PUT "+path+" HTTP/1.1", good) }
	body := func(body string) string { return lines("PUT "+keepAlivePath+"refresh HTTP/1.1", body) }
	guess := func(token string) string { return body(`{"expire_refresh_token":"` + token + `"}`) }
	number := 5000
	for _, test := range []struct {
		what, request string
		want          []int
	}{
		{"HTTP/1.0", lines("PUT "+keepAlivePath+"refresh HTTP/1.0", good), []int{200}},
		{"absolute URL", put("http://elsewhere.example" + keepAlivePath + "refresh"), []int{200}},
		{"query", put(keepAlivePath + "refresh?access_token=x&refresh_method=end"), []int{200}},
		{"two requests", body(good) + body(good), []int{200, 200}},
		{"unknown, then known", guess("x") + body(good), []int{404, 200}},
		{"bad, then known", body("[") + body(good), []int{400, 200}},
		{"no length", keepAliveHead + "\r\n", []int{400}},
		{"two lengths", keepAliveHead + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
		{"negative length", keepAliveHead + "Content-Length: -1\r\n\r\n{}", []int{400}},
		{"unknown coding", keepAliveHead + "Transfer-Encoding: gzip\r\n\r\n{}", []int{501}},
		{"compressed", keepAliveHead + "Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", []int{400}},
		{"length and chunks", keepAliveHead + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", []int{400}},
		{"bad chunk", keepAliveHead + "Transfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n0\r\n\r\n", []int{400}},
		{"trailers", keepAliveHead + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Trailer: 1\r\n\r\n", []int{400}},
		{"no HTTP", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", []int{400}},
		{"HTTP/2 preface", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []int{404}},
		{"no host", "PUT " + keepAlivePath + "refresh HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
		{"NUL in a header", keepAliveHead + "X-A: \x00\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
		{"upper case method", lines("put "+keepAlivePath+"refresh HTTP/1.1", good), []int{405}},
		{"invented method", lines("REFRESH "+keepAlivePath+"refresh HTTP/1.1", good), []int{405}},
		{"CONNECT", lines("CONNECT "+keepAlivePath+"refresh HTTP/1.1", good), []int{405}},
		{"TRACE", "TRACE " + keepAlivePath + "refresh HTTP/1.1\r\nHost: localhost\r\n\r\n", []int{405}},
		{"override", keepAliveHead + "X-HTTP-Method-Override: DELETE\r\nContent-Length: 2\r\n\r\n{}", []int{400}},
		{"trailing slash", put(keepAlivePath + "refresh/"), []int{404}},
		{"two slashes", put("/_matrix/client/v3/expiration//refresh"), []int{404}},
		{"dots", put(keepAlivePath + "x/../refresh"), []int{404}},
		{"escaped dots", put(keepAlivePath + "x%2F..%2Frefresh"), []int{404}},
		{"NUL", put(keepAlivePath + "refresh%00"), []int{404}},
		{"bad escape", put(keepAlivePath + "refresh%zz"), []int{400}},
		{"upper case", put(keepAlivePath + "REFRESH"), []int{404}},
		{"unicode", put(keepAlivePath + "refre%C5%BFh"), []int{404}},
		{"long path", put(keepAlivePath + strings.Repeat("x", 100000)), []int{431}},
		{"rather long path", put(keepAlivePath + strings.Repeat("x", 10000)), []int{404}},
		{"other version", put("/_matrix/client/v4/expiration/refresh"), []int{404}},
		{"no token", guess(""), []int{404}},
		{"long token", guess(strings.Repeat("x", 4000)), []int{404}},
		{"token with a space", guess(" " + token), []int{404}},
		{"padded token", guess(token + "="), []int{404}},
		{"token and NUL", guess(token + `\u0000`), []int{404}},
		{"NUL token", guess(`\u0000`), []int{404}},
		{"raw NUL", guess("\x00"), []int{400}},
		{"unicode token", guess("🔑" + strings.Repeat("ü", 100)), []int{404}},
		{"half a surrogate", guess(`\ud800`), []int{404}},
		{"SQL", guess(`' OR 1=1; DROP TABLE expiration_timers; --`), []int{404}},
		{"byte order mark", body("\ufeff" + good), []int{400}},
		{"nested", body(strings.Repeat("[", 4096)), []int{400}},
		{"nested object", body(`{"expire_refresh_token":` + strings.Repeat("[", 2000) + strings.Repeat("]", 2000) + `}`), []int{400}},
		{"other case", body(`{"Expire_Refresh_Token":"` + token + `"}`), []int{400}},
		{"large number", body(`{"expire_refresh_token":1` + strings.Repeat("0", 4000) + `}`), []int{400}},
		{"the hash", guess(fmt.Sprintf("%x", token)), []int{404}},
	} {
		number++ // a new address, which has not reached its limit
		c, err := s.stranger(t.Context(), number)
		require.NoError(t, err)
		_ = c.SetDeadline(time.Now().Add(hangUp))
		_, err = io.WriteString(c, test.request)
		require.NoError(t, err, test.what)
		for _, want := range test.want {
			res, err := http.ReadResponse(c.in, nil)
			require.NoError(t, err, test.what)
			answer, err := io.ReadAll(res.Body)
			require.NoError(t, err, test.what)
			require.Equal(t, want, res.StatusCode, "%s: %s", test.what, answer)
			require.NotContains(t, string(answer), token, test.what)
		}
		_ = c.Close()
	}

	// Many requests in one write are answered in order.
	c, err := s.stranger(t.Context(), number+1)
	require.NoError(t, err)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(hangUp))
	_, err = io.WriteString(c, strings.Repeat(body(`{}`)+guess("x")+put(keepAlivePath+"x"), 10))
	require.NoError(t, err)
	for range 10 {
		for _, want := range []string{"M_MISSING_PARAM", "M_NOT_FOUND", "M_UNRECOGNIZED"} {
			_, errcode, err := c.code()
			require.NoError(t, err)
			require.Equal(t, want, errcode)
		}
	}
	// None of these requests has created a new label.
	res, err := s.Anonymous().Do(t.Context(), http.MethodGet, "/metrics", nil)
	require.NoError(t, err)
	require.LessOrEqual(t, bytes.Count(res.Body, []byte("\ndendrite_expiration_keep_alives_total{")), 2*6)
}
