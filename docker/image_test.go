//go:build images

// Package docker tests the images in containers on the loopback device. The script docker/check builds the images.
package docker

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

const clientURL = "http://127.0.0.1:8008"

// TestComplement treats the image as Complement does: https://github.com/matrix-org/complement#image-requirements.
func TestComplement(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t)
	write(t, dir, "complement/ca/ca.crt", ca.certificate)
	write(t, dir, "complement/ca/ca.key", ca.key)
	write(t, dir, "complement/appservice/service.yaml", []byte(`{id: service, hs_token: hs, as_token: as, url: null,
		sender_localpart: service, rate_limited: false, namespaces: {users: [{exclusive: false, regex: .*}]}}`))
	create(t, "complement", "--network", "host", "--env", "SERVER_NAME=hs1", "complement")
	podman(t, "cp", dir+"/.", "complement:/")
	start(t, "complement")

	alice, err := homeserver.RegisterAt(t.Context(), clientURL, "complement", "alice")
	if err != nil {
		t.Fatal(err)
	}
	if alice.UserID != "@alice:hs1" {
		t.Errorf("alice is %s", alice.UserID)
	}
	wantUser(t, alice, "@alice:hs1")
	wantUser(t, &homeserver.Client{URL: clientURL, Token: "as"}, "@service:hs1")
	keys := ca.federation(t, "hs1")
	if keys.ServerName != "hs1" {
		t.Errorf("to other servers it is %q", keys.ServerName)
	}
	ports := podman(t, "image", "inspect", "--format", "{{json .Config.ExposedPorts}}", "complement")
	if ports != `{"8008/tcp":{},"8448/tcp":{}}` {
		t.Errorf("the image exposes %s", ports)
	}

	// After a restart the container uses the files that it wrote before.
	stop(t, "complement")
	start(t, "complement")
	wantUser(t, alice, "@alice:hs1")
	if again := ca.federation(t, "hs1"); !reflect.DeepEqual(again, keys) {
		t.Errorf("its keys were %v and are %v", keys, again)
	}
	podman(t, "exec", "complement", "ls", "jetstream/$G/streams/DendriteOutputRoomEvent")
}

// TestDendrite runs the image with nothing but a volume. Then it updates the image: it runs a new container with the same volume.
func TestDendrite(t *testing.T) {
	run := func() {
		create(t, "dendrite", "--network", "host", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all",
			"--volume", "data:/var/lib/dendrite", "dendrite")
		start(t, "dendrite")
	}
	run()
	podman(t, "exec", "dendrite", "create-account", "--config", "dendrite.yaml", "--username", "alice", "--password", "secret-enough")
	alice := &homeserver.Client{URL: clientURL}
	res, err := alice.Do(t.Context(), http.MethodPost, "/_matrix/client/v3/login", homeserver.JSON{
		"type": "m.login.password", "password": "secret-enough",
		"identifier": homeserver.JSON{"type": "m.id.user", "user": "alice"},
	})
	if err != nil || res.Code != http.StatusOK {
		t.Fatal(err, res)
	}
	alice.Token = res.Get("access_token").Str
	stop(t, "dendrite")
	podman(t, "rm", "dendrite")
	run()
	wantUser(t, alice, "@alice:localhost")
}

// write writes a file below a folder, and creates the folders in between.
func write(t *testing.T, dir, name string, data []byte) {
	t.Helper()
	name = filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// podman runs a command of podman and returns what it prints.
func podman(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), "podman", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("podman %s: %s: %s%s", strings.Join(args, " "), err, out, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// create creates a container, which is removed when the test ends.
func create(t *testing.T, name string, args ...string) {
	t.Helper()
	podman(t, append([]string{"create", "--name", name}, args...)...)
	t.Cleanup(func() {
		// The test's context has ended, so these commands run without it.
		logs, _ := exec.Command("podman", "logs", "--tail", "50", name).CombinedOutput()
		_ = exec.Command("podman", "rm", "--force", "--time", "0", name).Run()
		if t.Failed() {
			t.Logf("the last log lines of %s:\n%s", name, logs)
		}
	})
}

// start starts a container and returns when the image's own health check succeeds.
func start(t *testing.T, name string) {
	t.Helper()
	podman(t, "start", name)
	ctx, cancel := context.WithTimeout(t.Context(), patience.For(time.Minute))
	defer cancel()
	for {
		out, err := exec.CommandContext(ctx, "podman", "healthcheck", "run", name).CombinedOutput()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not healthy: %s", out)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// stop stops a container as a container engine does, with ten seconds of time.
func stop(t *testing.T, name string) {
	t.Helper()
	podman(t, "stop", name)
	if code := podman(t, "inspect", "--type", "container", "--format", "{{.State.ExitCode}}", name); code != "0" {
		t.Errorf("%s ended with %s", name, code)
	}
}

// wantUser checks which user a client's token belongs to.
func wantUser(t *testing.T, c *homeserver.Client, user string) {
	t.Helper()
	res, err := c.Do(t.Context(), http.MethodGet, "/_matrix/client/v3/account/whoami", nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := res.Get("user_id").Str; got != user {
		t.Errorf("the token is of %q, not of %s: %s", got, user, res)
	}
}

// authority is a certificate authority like Complement's.
type authority struct {
	certificate, key []byte // PEM
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the authority of a test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return authority{
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}),
	}
}

// serverKeys is a server's answer to a request for its keys.
type serverKeys struct {
	ServerName string         `json:"server_name"`
	VerifyKeys map[string]any `json:"verify_keys"`
}

// federation requests the server's keys at the federation port. The server must have a certificate for the name, signed by the authority.
func (a authority) federation(t *testing.T, name string) serverKeys {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.certificate)
	client := http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name}, DisableKeepAlives: true,
	}}
	res, err := client.Get("https://127.0.0.1:8448/_matrix/key/v2/server")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var keys serverKeys
	if err = json.NewDecoder(res.Body).Decode(&keys); err != nil {
		t.Fatal(err)
	}
	return keys
}
