// Package deployer runs the homeservers of Complement's tests as processes.
//
// Complement's own deployer makes a Docker container of each homeserver. This one starts a Dendrite binary for each, either stock or with
// expiring events. The variable COMPLEMENT_BASE_IMAGE has the path of the binary. COMPLEMENT_BASE_IMAGE_HS1 and so on override it for one
// server. With Docker, these variables name images.
//
// The test process runs in mount, network and PID namespaces of its own (isolate.go), which it shares with all servers. Their only network
// is loopback. Server hsN has the address 127.0.1.N, with port 8008 for clients and 8448 for federation. The file /etc/hosts has the names
// of the servers, and of the tests' own federation servers. However the test process ends, the namespaces and all their processes end with
// it. A server has the configuration that Dendrite generates for Complement (config.go), except that data which must survive a restart is
// on disk.
//
// Only one deployment can run at a time, because no test of Complement needs two.
package deployer

import (
	"fmt"
	"os"
	"path"
	"testing"

	"github.com/matrix-org/complement/b"
	"github.com/matrix-org/complement/config"
	"github.com/matrix-org/complement/ct"
	"github.com/matrix-org/complement/helpers"
	"github.com/sirupsen/logrus"
)

// Deployer makes deployments.
type Deployer struct {
	config *config.Complement
}

// Run sets up the process's namespaces, calls ready with a Deployer, runs the tests of a package, and exits.
func Run(m *testing.M, namespace string, ready func(*Deployer)) {
	cfg := config.NewConfigFromEnvVars(namespace, "")
	if err := isolate(cfg.HostnameRunningComplement); err != nil {
		fmt.Fprintln(os.Stderr, "not isolated:", err)
		os.Exit(1)
	}
	// The tests' client libraries log every failed request, and many requests are meant to fail.
	logrus.SetLevel(logrus.ErrorLevel)
	ready(&Deployer{config: cfg})
	os.Exit(m.Run())
}

// Servers deploys a number of servers.
func (d *Deployer) Servers(t ct.TestLike, number int) *Deployment {
	t.Helper()
	var blueprint b.Blueprint
	for n := 1; n <= number; n++ {
		blueprint.Homeservers = append(blueprint.Homeservers, b.Homeserver{Name: fmt.Sprintf("hs%d", n)})
	}
	return d.Blueprint(t, blueprint)
}

// Blueprint deploys the servers of a blueprint, with its users and application services. It cannot create rooms and account data, which no
// test of Complement asks for.
func (d *Deployer) Blueprint(t ct.TestLike, blueprint b.Blueprint) *Deployment {
	t.Helper()
	dir, err := os.MkdirTemp("", "complement-")
	if err != nil {
		ct.Fatalf(t, "deploying: %s", err)
	}
	deployment := &Deployment{config: d.config, dir: dir, servers: map[string]*server{}, tokens: map[string]string{}}
	complete := false
	defer func() {
		if !complete {
			deployment.destroy()
		}
	}()
	for _, hs := range blueprint.Homeservers {
		if len(hs.Rooms) > 0 {
			ct.Fatalf(t, "blueprint %s: rooms cannot be deployed", blueprint.Name)
		}
		s, err := newServer(d.config, path.Join(dir, hs.Name), hs)
		if err == nil {
			deployment.servers[hs.Name] = s
			err = s.start()
		}
		if err != nil {
			ct.Fatalf(t, "deploying %s: %s", hs.Name, err)
		}
		for _, as := range hs.ApplicationServices {
			deployment.tokens["@"+as.SenderLocalpart+":"+hs.Name] = as.ASToken
		}
		for _, user := range hs.Users {
			c := deployment.register(t, hs.Name, user.Localpart, helpers.RegistrationOpts{})
			if user.DisplayName != "" {
				c.MustSetDisplayName(t, user.DisplayName)
			}
		}
	}
	complete = true
	return deployment
}
