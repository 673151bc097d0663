//go:build all

package install

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The files for nginx in docs/install and docs/element-call work beside each other. The one for calls passes on the requests for LiveKit and
// for its token service, and serves the pages of Element Call.
func TestNginxForCalls(t *testing.T) {
	dir, https := t.TempDir(), freeAddress(t)
	authority := writeCertificate(t, dir)
	asked := make(chan *http.Request, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { asked <- r }))
	defer backend.Close()
	pages := filepath.Join(dir, "pages")
	require.NoError(t, os.Mkdir(pages, 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(pages, "index.html"), []byte("the page"), 0o644))
	listen := []string{
		"	listen [::]:443 ssl http2;\n", "", "listen 443 ", "listen " + https + " ",
	}
	calls := adapt(t, "element-call/nginx.conf", dir, append(listen,
		"127.0.0.1:8080", address(t, backend.URL), "127.0.0.1:7880", address(t, backend.URL),
		"/etc/letsencrypt/live/rtc.example.com/", dir+"/", "/var/www/element-call", pages)...)
	beside := t.TempDir()
	matrix := adapt(t, "install/nginx.conf", beside, append(listen,
		"	listen 8448 ssl http2;\n", "", "	listen [::]:8448 ssl http2;\n", "",
		"/etc/letsencrypt/live/example.com/", dir+"/", "/var/log/nginx/", dir+"/")...)
	runNginx(t, dir, https, calls+"; include "+matrix)

	client := &http.Client{Timeout: soon, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: trusting(t, authority)},
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, https)
		},
	}}
	defer client.CloseIdleConnections()
	get := func(url string) (status int, body string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		require.NoError(t, err)
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "websocket")
		res, err := client.Do(req)
		require.NoError(t, err)
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		return res.StatusCode, string(text)
	}
	status, _ := get("https://rtc.example.com/livekit/jwt/sfu/get")
	require.Equal(t, http.StatusOK, status)
	require.Equal(t, "/sfu/get", (<-asked).URL.Path)
	status, _ = get("https://rtc.example.com/livekit/sfu/rtc?access_token=x")
	require.Equal(t, http.StatusOK, status)
	req := <-asked
	require.Equal(t, "/rtc?access_token=x", req.RequestURI)
	require.Equal(t, []string{"websocket", "upgrade"}, []string{req.Header.Get("Upgrade"), req.Header.Get("Connection")})
	status, _ = get("https://rtc.example.com/")
	require.Equal(t, http.StatusNotFound, status)
	for _, path := range []string{"", "room/#/a-call"} {
		status, body := get("https://call.example.com/" + path)
		require.Equal(t, http.StatusOK, status)
		require.Equal(t, "the page", body)
	}
}

// Caddy takes the file of docs/element-call, and the one that "After install.md" makes of both.
func TestCaddyForCalls(t *testing.T) {
	dir := t.TempDir()
	calls, err := os.ReadFile(adapt(t, "element-call/Caddyfile", dir))
	require.NoError(t, err)
	validate(t, filepath.Join(dir, "Caddyfile"))
	_, added, found := strings.Cut(string(calls), "\nrtc.")
	require.True(t, found)
	both := adapt(t, "install/Caddyfile", dir)
	file, err := os.ReadFile(both)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(both, append(file, "rtc."+added...), 0o600))
	validate(t, both)
}

// validate has Caddy check a file.
func validate(t *testing.T, file string) {
	t.Helper()
	caddy := exec.CommandContext(t.Context(), installed(t, "caddy"), "validate", "--adapter", "caddyfile", "--config", file)
	caddy.Env = append(os.Environ(), "HOME="+t.TempDir())
	out, err := caddy.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// The commands of docs/install.md for a server whose name leads to another machine leave valid files in which only matrix.example.com is
// served.
func TestNameElsewhere(t *testing.T) {
	doc, err := os.ReadFile(docs + "install.md")
	require.NoError(t, err)
	commands := regexp.MustCompile(`(?m)^sed -i -e .*$`).FindAllString(string(doc), -1)
	require.Len(t, commands, 2)
	dir := t.TempDir()
	certificates := filepath.Join(dir, "live", "matrix."+serverName)
	require.NoError(t, os.MkdirAll(certificates, 0o700))
	writeCertificate(t, certificates)
	caddy := adapt(t, "install/Caddyfile", dir)
	nginx := adapt(t, "install/nginx.conf", dir, "/etc/letsencrypt/", dir+"/", "/var/log/nginx/", dir+"/",
		"	listen [::]:443 ssl http2;\n", "", "listen 443 ", "listen "+freeAddress(t)+" ")
	for i, file := range []string{caddy, nginx} {
		bash := exec.CommandContext(t.Context(), "bash", "-eu", "-c", regexp.MustCompile(`/etc/\S+$`).ReplaceAllString(commands[i], file))
		bash.Env = append(os.Environ(), "NAME="+serverName)
		out, err := bash.CombinedOutput()
		require.NoError(t, err, "%s", out)
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		served := regexp.MustCompile(`(?m)^(?:\S*example\.com.*\{|\s*server_name .*;)$`).FindAllString(string(text), -1)
		require.Len(t, served, 1, "%s", text)
		require.Contains(t, served[0], "matrix."+serverName)
		require.NotContains(t, served[0], ", ")
		require.NotRegexp(t, `(?m)^\s*listen.*8448`, string(text))
	}
	validate(t, caddy)
	testNginx(t, dir, nginx)
}
