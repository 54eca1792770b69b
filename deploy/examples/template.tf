# A managed instance group of mesh nodes, autohealed on the agent's /healthz: it is 200 only once
# bootstrap has finished, and fails only for what a new VM would mend.
variable "archive" { description = "gs://BUCKET/service-proxy-agent-VERSION.tgz" }
variable "service_account" { description = "e-mail; needs roles/trafficdirector.client, roles/logging.logWriter and roles/storage.objectViewer" }

resource "google_compute_instance_template" "mesh" {
  name_prefix  = "mesh-"
  machine_type = "e2-small"
  labels       = { gce-service-proxy = "on" }
  metadata = {
    enable-guest-attributes = "TRUE"
    gce-service-proxy = jsonencode({
      api-version = "0.2"
      service     = { serving-ports = [80] }
      labels      = { app = "review" }
      proxy-spec  = { network = "" }
    })
    startup-script = replace(file("${path.module}/startup-script.sh"), "gs://BUCKET/service-proxy-agent-VERSION.tgz", var.archive)
  }
  disk { source_image = "debian-cloud/debian-12" }
  network_interface {
    network = "default"
    # The way out: to the bucket, trafficdirector.googleapis.com and, where the image lacks iptables
    # or ca-certificates, the distribution's packages. Without an external address the subnet needs
    # Cloud NAT, or Private Google Access and an image that has both packages; with neither,
    # autohealing would recreate the VMs for ever.
    access_config {}
  }
  service_account {
    email  = var.service_account
    scopes = ["cloud-platform"]
  }
  lifecycle { create_before_destroy = true }
}

resource "google_compute_health_check" "agent" {
  name = "service-proxy-agent"
  http_health_check {
    port         = 15020
    request_path = "/healthz"
  }
}

resource "google_compute_firewall" "health_checks" {
  name          = "service-proxy-agent-health-checks"
  network       = "default"
  source_ranges = ["35.191.0.0/16", "130.211.0.0/22"]
  allow {
    protocol = "tcp"
    ports    = ["15020"]
  }
}

resource "google_compute_instance_group_manager" "mesh" {
  name               = "mesh"
  base_instance_name = "mesh"
  zone               = "us-central1-a"
  target_size        = 2
  version { instance_template = google_compute_instance_template.mesh.id }
  auto_healing_policies {
    health_check      = google_compute_health_check.agent.id
    initial_delay_sec = 600
  }
}
