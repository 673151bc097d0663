//go:build all

package install

import (
	"encoding/base64"
	"encoding/hex"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	dendriteconfig "github.com/matrix-org/dendrite/setup/config"
	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
)

const (
	elementCall  = "element-call.md"
	lkJWTService = "lk-jwt-service.md"
)

// shell comes before the commands of a page. Programs that would change the machine or use the network do nothing, or take files from the
// folder $DOWNLOADS. The proxies have tests of their own.
const shell = `set -eu -o pipefail
for program in apt-get ufw systemctl certbot caddy nginx livekit-server; do eval "$program() { :; }"; done
curl() {
  case $1 in
    -fsSLO) cp "$DOWNLOADS/$(basename "${!#}")" . ;;
    -fsSLo) cp "$DOWNLOADS/$(basename "${!#}")" "$2" ;;
  esac
}
npm() { cp "$DOWNLOADS/element-hq-element-call-embedded-0.26.1.tgz" .; }
sha512sum() { :; } # of the real package
umask 022
`

// elsewhere begins the blocks that are for a checkout or for the running server.
var elsewhere = regexp.MustCompile(`^(CGO_ENABLED=0 go |export REGISTRATION_SECRET|apt-get install chromium)`)

// codeBlock matches a block of commands, which may be part of a list.
var codeBlock = regexp.MustCompile("(?ms)^ *```sh\n(.*?)^ *```$")

// after makes a folder with the files of install.md for a server, and runs the commands of pages there, except for the blocks that contain
// a text. It returns the folder, which stands for the root of the file system.
func after(t *testing.T, name string, without string, pages ...string) (root string) {
	t.Helper()
	root = t.TempDir()
	for source, target := range map[string]string{
		"install/dendrite.yaml": "etc/dendrite/dendrite.yaml", "install/Caddyfile": "etc/caddy/Caddyfile",
		"install/nginx.conf": "etc/nginx/sites-available/matrix",
	} {
		write(t, filepath.Join(root, target), strings.ReplaceAll(read(t, docs+source), serverName, name))
	}
	for _, dir := range []string{"etc/systemd/system", "etc/nginx/sites-enabled", "usr/local/bin", "var/www"} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, dir), 0o755))
	}
	documents, err := filepath.Abs(docs)
	require.NoError(t, err)
	here := strings.NewReplacer("/opt/dendrite/docs/", documents+"/", " /etc/", " "+root+"/etc/", " /usr/local/bin", " "+root+"/usr/local/bin",
		" /var/www/", " "+root+"/var/www/")
	script := shell
	for _, page := range pages {
		for _, block := range codeBlock.FindAllStringSubmatch(read(t, docs+page), -1) {
			commands := strings.TrimLeft(block[1], " ")
			if !elsewhere.MatchString(commands) && (without == "" || !strings.Contains(commands, without)) {
				script += here.Replace(commands)
			}
		}
	}
	bash := exec.CommandContext(t.Context(), "bash", "-c", script)
	bash.Dir, bash.Env = t.TempDir(), append(os.Environ(), "DOWNLOADS="+downloads(t), "TMPDIR="+t.TempDir())
	out, err := bash.CombinedOutput()
	require.NoError(t, err, "%s\n%s", script, out)
	return root
}

// downloads returns a folder with files that stand for those on the internet.
func downloads(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "livekit-server"), "LiveKit")
	write(t, filepath.Join(dir, "LICENSE"), "its licence")
	write(t, filepath.Join(dir, "package/dist/config.json"), `{"matrix_rtc_session":{"wait_for_key_rotation_ms":5000}}`)
	write(t, filepath.Join(dir, "package/dist/index.html"), "<!doctype html><html><head></head></html>")
	write(t, filepath.Join(dir, "package/dist/assets/page.js"), "the page")
	bash := exec.CommandContext(t.Context(), "bash", "-euc", `ARCH=$(dpkg --print-architecture)
		tar -czf "livekit_1.13.4_linux_$ARCH.tar.gz" livekit-server LICENSE
		sha256sum "livekit_1.13.4_linux_$ARCH.tar.gz" > checksums.txt
		echo "$(printf 0%.0s {1..64})  livekit_1.13.4_windows_amd64.zip" >> checksums.txt
		tar -czf element-hq-element-call-embedded-0.26.1.tgz package
		echo service > "lk-jwt-service_linux_$ARCH"`)
	bash.Dir = dir
	out, err := bash.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return dir
}

// load reads our sections of a dendrite.yaml, as the homeserver does.
func load(path, name string) (*config.Config, error) {
	var dendrite dendriteconfig.Dendrite
	dendrite.Global.ServerName = "x"
	dendrite.Global.WellKnownClientName = "https://matrix." + name
	dendrite.Global.DatabaseOptions.ConnectionString = "postgresql://localhost/dendrite"
	return config.Load(path, &dendrite)
}

// The commands of element-call.md add calls to the server of install.md: homeserver and LiveKit have the same new secret, LiveKit's webhooks
// go where the homeserver takes them, and the pages of Element Call know the homeserver.
func TestElementCallPage(t *testing.T) {
	const name = "example.org"
	root := after(t, name, "", elementCall)
	c, err := load(filepath.Join(root, "etc/dendrite/dendrite.yaml"), name)
	require.NoError(t, err)
	l := c.MatrixRTC.LiveKit
	require.Equal(t, "wss://rtc."+name+"/livekit/sfu", l.URL)
	require.Equal(t, "https://matrix."+name+l.ServicePath, l.ServiceURL)
	require.Regexp(t, `^[0-9a-f]{64}$`, string(l.APISecret))

	liveKit := filepath.Join(root, "etc/livekit/livekit.yaml")
	require.Contains(t, read(t, liveKit), "\n  "+l.APIKey+": "+string(l.APISecret)+"\n")
	require.Contains(t, read(t, liveKit), `urls: ["http://127.0.0.1:8008`+l.ServicePath+`/sfu_webhook"]`)
	info, err := os.Stat(liveKit)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	require.Equal(t, "LiveKit", read(t, filepath.Join(root, "usr/local/bin/livekit-server")))
	require.NoFileExists(t, filepath.Join(root, "usr/local/bin/LICENSE"))

	site := filepath.Join(root, "var/www/element-call")
	require.Equal(t, "https://matrix."+name, gjson.Get(read(t, site+"/config.json"), `default_server_config.m\.homeserver.base_url`).Str)
	require.Contains(t, read(t, site+"/index.html"), `<head><base href="/">`)
	require.FileExists(t, site+"/assets/page.js")
	requireReplaced(t, root)
	validate(t, filepath.Join(root, "etc/caddy/Caddyfile"))
}

// The commands of lk-jwt-service.md make LiveKit, homeserver and service agree.
func TestLKJWTServicePage(t *testing.T) {
	const name = "example.org"
	root := after(t, name, "element-call/matrix_rtc.yaml", elementCall, lkJWTService)
	c, err := load(filepath.Join(root, "etc/dendrite/dendrite.yaml"), name)
	require.NoError(t, err)
	require.Nil(t, c.MatrixRTC.LiveKit)
	require.Len(t, c.MatrixRTC.Transports, 1)
	require.Equal(t, "https://rtc."+name+"/livekit/jwt", c.MatrixRTC.Transports[0].LiveKitServiceURL)

	liveKit, service := read(t, filepath.Join(root, "etc/livekit/livekit.yaml")), read(t, filepath.Join(root, "etc/lk-jwt-service.env"))
	secret := regexp.MustCompile(`\n  matrix: ([0-9a-f]{64})\n`).FindStringSubmatch(liveKit)
	require.NotNil(t, secret, liveKit)
	require.Contains(t, service, "\nLIVEKIT_SECRET="+secret[1]+"\n")
	require.Contains(t, service, "\nLIVEKIT_FULL_ACCESS_HOMESERVERS="+name+"\n")
	require.Contains(t, liveKit, `urls: ["http://127.0.0.1:8080/sfu_webhook"]`)
	requireReplaced(t, root)
	validate(t, filepath.Join(root, "etc/caddy/Caddyfile"))
}

// requireReplaced requires that no file has a placeholder, or a name of the examples.
func requireReplaced(t *testing.T, root string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(root, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() && filepath.Ext(path) != ".service" {
			for line := range strings.Lines(read(t, path)) {
				if !strings.HasPrefix(strings.TrimSpace(line), "#") {
					require.NotContains(t, line, "change-me", path)
					require.NotContains(t, line, "example.com", path)
				}
			}
		}
		return err
	}))
}

// A server with the secret of our example does not start.
func TestPlaceholderIsRefused(t *testing.T) {
	path := adapt(t, "install/dendrite.yaml", t.TempDir())
	_, err := load(path, serverName)
	require.NoError(t, err)
	write(t, path, read(t, path)+read(t, docs+"element-call/matrix_rtc.yaml"))
	_, err = load(path, serverName)
	require.ErrorContains(t, err, `config key "matrix_rtc.livekit.api_secret": the value is still the placeholder of an example`)
}

// The page checks the package of Element Call by the same checksum, and has the same version, as the test that plays calls.
func TestElementCallChecksum(t *testing.T) {
	locked := gjson.Get(read(t, "../elementcall/js/package-lock.json"), `packages.node_modules/@element-hq/element-call-embedded`)
	sum, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(locked.Get("integrity").Str, "sha512-"))
	require.NoError(t, err)
	require.Contains(t, read(t, docs+elementCall), hex.EncodeToString(sum)+"  element-hq-element-call-embedded-"+locked.Get("version").Str+".tgz")
}
